"""Sources that a test compiles against csrc, for an instruction set of the CPU."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import torch

from torchweld import _cpu

CSRC = Path(__file__).resolve().parents[1] / "csrc"
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
AVX512_BF16 = (*AVX512, "-mavx512bf16")
AMX = (*AVX512_BF16, "-mamx-tile", "-mamx-bf16")
SOFTWARE_TILES = ("-include", str(Path(__file__).parent / "cpu" / "software_tiles.h"))
FLAGS = {"baseline": (), "avx2": AVX2, "avx512": AVX512, "avx512_bf16": AVX512_BF16, "amx": AMX}


def isas() -> list[str]:
    """The instruction sets that a source can run on here. AMX's tiles are in software where the CPU has none."""
    here = _cpu.available_isas()
    return [isa for isa in FLAGS if isa in here or (isa == "amx" and "avx512_bf16" in here)]


def _has_tiles() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and " amx_bf16" in info.read_text()


def compiled(source: Path, isa: str, folder: Path) -> ctypes.CDLL:
    """A library made of `source`, whose `extern "C"` functions are its attributes."""
    library = folder / f"{source.stem}_{isa}.so"
    command = ["g++", "-std=gnu++17", "-O1", "-shared", "-fPIC", "-Wno-psabi", f"-I{CSRC}", *FLAGS[isa]]
    if isa == "amx" and not _has_tiles():
        command += SOFTWARE_TILES
    subprocess.run([*command, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def memory(t: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())
