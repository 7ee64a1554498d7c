"""A small test of each instruction against its documentation, on the emulated GPU and on a real one."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from emulation import build

PROGRAMS = sorted(path.stem for path in (build.HERE / "programs").glob("*_instructions.cu"))


def hold(program: Path, seed: int = 0) -> None:
    environment = os.environ | {f"TORCHWELD_EMULATION_{name}": str(seed) for name in ("SEED", "ROUNDING")}
    found = subprocess.run([program], env=environment, capture_output=True, text=True, check=False)
    lines = found.stdout.splitlines()
    assert lines and not found.stderr, found
    assert [line for line in lines if not line.endswith(": right")] == []
    assert found.returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(build.unavailable() is not None, reason="no g++")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", PROGRAMS)
def test_on_the_machine(name: str, seed: int) -> None:
    """With several schedules: the seed also decides when asynchronous copies arrive, and errors of approximations."""
    hold(build.program(name), seed)


@pytest.mark.cuda
@pytest.mark.parametrize("name", PROGRAMS)
def test_on_a_gpu(name: str, tmp_path: Path) -> None:
    """The hardware must do what the machine does."""
    if name.startswith("sm90") and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("this GPU is no Hopper")
    sources = [build.HERE / f"programs/{name}.cu", build.CSRC / "cuda/device.cpp"]
    architecture = ["-gencode=arch=compute_90a,code=sm_90a"] if name.startswith("sm90") else ["-arch=native"]
    flags = ["-std=c++17", *architecture, f"-I{build.CSRC}", '-DTORCHWELD_CUDA_ARCHITECTURES="native"']
    subprocess.run(["nvcc", *flags, *sources, "-o", tmp_path / "program"], check=True)
    hold(tmp_path / "program")
