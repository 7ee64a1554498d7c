"""The CPU kernels on another processor than x86: compiled and run where cross compiler and emulator are installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted(p for p in (ROOT / "csrc" / "cpu").rglob("*.cpp") if p.name != "isa.cpp")
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = ["-std=gnu++17", "-DTORCHWELD_ISA=baseline", f"-I{ROOT / 'csrc'}", "-Wno-psabi"]

pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs {COMPILER}")


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("source", KERNELS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_compiles(source: Path) -> None:
    run(COMPILER, *FLAGS, "-fopenmp", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", str(source))


@pytest.mark.skipif(shutil.which(EMULATOR) is None, reason=f"needs {EMULATOR}")
def test_attention_runs(tmp_path: Path) -> None:
    """Packed sequences with dropout, forward and backward, against loops in double precision."""
    sources = [
        ROOT / "tests" / "cpu" / "portability" / "attention.cpp",
        *(p for p in KERNELS if p.parent.name == "attention" and p.stem != "paged"),
    ]
    program = str(tmp_path / "attention")
    run(COMPILER, *FLAGS, "-static", *map(str, sources), "-o", program)  # unoptimised: compiled in a few seconds
    run(EMULATOR, program)
