"""The elementary functions of csrc/cpu/simd/exp.h on their own, compiled for each instruction set that this CPU has."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from by_exponent import by_exponent, hold_by_row
from torchweld import _cpu

CSRC = Path(__file__).resolve().parents[2] / "csrc"
AVX2 = ("-mavx2", "-mfma", "-mf16c")
FLAGS = {"baseline": (), "avx2": AVX2, "avx512": (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")}
SOURCE = """
#include "cpu/simd/exp.h"
using namespace torchweld::cpu;
extern "C" void run(const float* x, float* tanh, float* log, long n) {
  for (long i = 0; i < n; i += W) store(tanh + i, vtanh(load(x + i))), store(log + i, vlog(load(x + i)));
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("isa", [isa for isa in FLAGS if isa in _cpu.available_isas()])
def test_tanh_and_log(isa: str, tmp_path: Path) -> None:
    source, library = tmp_path / "functions.cpp", tmp_path / "functions.so"
    source.write_text(SOURCE)
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{CSRC}", *FLAGS[isa], str(source), "-o"]
    subprocess.run([*command, str(library)], check=True)
    dense = torch.linspace(0.5, 2, 4096).view(2, 2048)  # where tanh changes from a polynomial to exponentials
    for x in (by_exponent(torch.float32), dense, -dense):
        tanh, log = torch.empty_like(x), torch.empty_like(x)
        ctypes.CDLL(str(library)).run(
            *(ctypes.c_void_p(t.data_ptr()) for t in (x, tanh, log)), ctypes.c_long(x.numel())
        )
        hold_by_row(tanh, x.tanh(), x.double().tanh(), f"tanh on {isa}")
        assert torch.equal(tanh.signbit()[~x.isnan()], x.signbit()[~x.isnan()])
        normal = (x[:, 0] > 0) & (x[:, 0] >= torch.finfo(torch.float32).tiny)
        if normal.any():
            hold_by_row(log[normal], x[normal].log(), x[normal].double().log(), f"log on {isa}")
