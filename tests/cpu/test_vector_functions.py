"""The vector functions of csrc/cpu/simd on their own, compiled for each instruction set that this CPU has."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest
import torch

from by_exponent import by_exponent, hold_by_row
from compiled import compiled, isas, memory

SOURCE = Path(__file__).parent / "programs" / "functions.cpp"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")]


# The vector functions of amx are those of avx512_bf16.
@pytest.fixture(scope="module", params=[isa for isa in isas() if isa != "amx"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled(SOURCE, request.param, tmp_path_factory.mktemp("functions"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stores_round_to_nearest_even(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Every sign, exponent and leading bits of the mantissa, with what is a tie, and what lies beside it, behind."""
    behind = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    x = (torch.arange(2**16)[:, None] * 2**16 + behind).to(torch.uint32).view(torch.float32)
    for ordered in (x, x.T.contiguous()):  # alike values beside each other, and unlike ones
        n = ordered.numel()
        out = torch.empty(6, n, dtype=dtype)
        getattr(library, str(dtype).removeprefix("torch."))(memory(ordered), memory(out), ctypes.c_long(n))
        expected = ordered.view(-1).to(dtype)
        # NaNs are any, but NaNs.
        found, expected = (torch.where(t.isnan(), torch.nan, t).view(torch.int16) for t in (out, expected))
        assert torch.equal(found, expected.expand_as(found))


def test_tanh_and_log(library: ctypes.CDLL) -> None:
    dense = torch.linspace(0.5, 2, 4096).view(2, 2048)  # where tanh changes from a polynomial to exponentials
    for x in (by_exponent(torch.float32), dense, -dense):
        tanh, log = torch.empty_like(x), torch.empty_like(x)
        library.functions(memory(x), memory(tanh), memory(log), ctypes.c_long(x.numel()))
        hold_by_row(tanh, x.tanh(), x.double().tanh(), "tanh")
        assert torch.equal(tanh.signbit()[~x.isnan()], x.signbit()[~x.isnan()])
        normal = (x[:, 0] > 0) & (x[:, 0] >= torch.finfo(torch.float32).tiny)
        if normal.any():
            hold_by_row(log[normal], x[normal].log(), x[normal].double().log(), "log")


def test_exponential_of_negative_numbers(library: ctypes.CDLL) -> None:
    """Where a rounding of x is larger than what exp can take, too: 0."""

    def exponential(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        library.exponential(memory(x), memory(out), ctypes.c_long(x.numel()))
        return out

    near = -torch.linspace(0, 87, 1 << 16).view(64, -1)  # as far as float32 has normal numbers
    hold_by_row(exponential(near), near.exp(), near.double().exp(), "exp")
    far = -torch.linspace(104, 200, 1 << 12), -torch.exp(torch.linspace(5, 88.7, 1 << 20))
    for x in (*far, torch.full((64,), -torch.inf)):
        assert (exponential(x) == 0).all()
    assert exponential(torch.full((64,), torch.nan)).isnan().all()
