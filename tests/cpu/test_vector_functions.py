"""The vector functions of csrc/cpu/simd on their own, compiled for each instruction set that this CPU has."""

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
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
FLAGS = {"baseline": (), "avx2": AVX2, "avx512": AVX512, "avx512_bf16": (*AVX512, "-mavx512bf16")}
SOURCE = """
#include "cpu/simd/exp.h"
using namespace torchweld::cpu;
extern "C" void functions(const float* x, float* tanh, float* log, long n) {
  for (long i = 0; i < n; i += W) store(tanh + i, vtanh(load(x + i))), store(log + i, vlog(load(x + i)));
}
template <class T>
void stores(const float* x, T* out, long n) {  // n roundings by each of the stores
  auto value = [&](int64_t i, auto lanes) { return load(x + i, lanes); };
  for_each_vector(n, [&](int64_t i, auto lanes) { store(out + i, value(i, lanes), lanes); });
  for_each_vector(n, [&](int64_t i, auto lanes) { store_rounded(out + n + i, value(i, lanes), lanes); });
  for (int past_cache = 0; past_cache < 2; ++past_cache) {
    out += 2 * n;
    for_each_value(n, value, [&](int64_t i, auto v, auto lanes) { store_output(out + i, v, lanes, past_cache); });
    for_each_vector(n, [&](int64_t i, auto l) { store_output(out + n + i, value(i, l), l, past_cache); });
  }
}
extern "C" void bfloat16(const float* x, void* out, long n) { stores(x, static_cast<bf16*>(out), n); }
extern "C" void float16(const float* x, void* out, long n) { stores(x, static_cast<f16*>(out), n); }
"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")]


@pytest.fixture(scope="module", params=[isa for isa in FLAGS if isa in _cpu.available_isas()])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("functions")
    source, library = folder / "functions.cpp", folder / "functions.so"
    source.write_text(SOURCE)
    command = ["g++", "-std=gnu++17", "-O1", "-shared", "-fPIC", "-Wno-psabi", f"-I{CSRC}", *FLAGS[request.param]]
    subprocess.run([*command, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def memory(t: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stores_round_to_nearest_even(compiled: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Every sign, exponent and leading bits of the mantissa, with what is a tie, and what lies beside it, behind."""
    behind = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    x = (torch.arange(2**16)[:, None] * 2**16 + behind).to(torch.uint32).view(torch.float32)
    for ordered in (x, x.T.contiguous()):  # alike values beside each other, and unlike ones
        n = ordered.numel()
        out = torch.empty(6, n, dtype=dtype)
        getattr(compiled, str(dtype).removeprefix("torch."))(memory(ordered), memory(out), ctypes.c_long(n))
        expected = ordered.view(-1).to(dtype)
        # NaNs are any, but NaNs.
        found, expected = (torch.where(t.isnan(), torch.nan, t).view(torch.int16) for t in (out, expected))
        assert torch.equal(found, expected.expand_as(found))


def test_tanh_and_log(compiled: ctypes.CDLL) -> None:
    dense = torch.linspace(0.5, 2, 4096).view(2, 2048)  # where tanh changes from a polynomial to exponentials
    for x in (by_exponent(torch.float32), dense, -dense):
        tanh, log = torch.empty_like(x), torch.empty_like(x)
        compiled.functions(memory(x), memory(tanh), memory(log), ctypes.c_long(x.numel()))
        hold_by_row(tanh, x.tanh(), x.double().tanh(), "tanh")
        assert torch.equal(tanh.signbit()[~x.isnan()], x.signbit()[~x.isnan()])
        normal = (x[:, 0] > 0) & (x[:, 0] >= torch.finfo(torch.float32).tiny)
        if normal.any():
            hold_by_row(log[normal], x[normal].log(), x[normal].double().log(), "log")
