"""The tensor-core products of the CUDA attention against plain matrix products, on the emulated GPU."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize(("size", "padded"), [(32, 32), (64, 64), (128, 128), (24, 32), (7, 32), (50, 64), (100, 128)])
@pytest.mark.parametrize("rows", [16, 9])
def test_products(emulated: ModuleType, size: int, padded: int, rows: int, dtype: torch.dtype) -> None:
    """a @ b^T by ldmatrix and mma, and (a @ b^T) @ b, whose left operand never leaves the registers.

    What lies beyond `size` columns and `rows` rows is NaN and must not be read.
    """
    generator = torch.Generator().manual_seed(size)
    element = torch.finfo(dtype).bits // 8
    stride = padded + 16 // element
    memory = torch.full((2, 16, stride), torch.nan, dtype=dtype)
    memory[:, :, :size] = torch.randn(2, 16, size, generator=generator)
    memory[1, rows:] = torch.nan
    a, b = memory[0, :, :size], memory[1, :, :size]
    exact_b = torch.where(torch.arange(16).unsqueeze(1) < rows, b, 0).double()
    expected = a.double() @ exact_b.T

    for packets in (True, False):
        inner, outer = torch.full((16, 16), torch.nan), torch.full((16, size), torch.nan)
        emulated.products(a, b, rows, packets, padded, inner, outer)
        # Products of 16-bit numbers are exact in fp32; those of floats lose what two TF32 numbers do not hold.
        torch.testing.assert_close(inner.double(), expected, rtol=0, atol=2e-5)
        weights = inner.to(dtype).double()
        bound = (weights.abs() @ exact_b.abs()).max().item() * 2**-21
        torch.testing.assert_close(outer.double(), weights @ exact_b, rtol=0, atol=bound)
