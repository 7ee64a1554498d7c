"""The CUDA kernels of gelu on the emulated GPU (tests/emulation): every number of 16 bits, every size of a tail."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from by_exponent import hold_gelu
from torchweld import ops, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN = float("nan")


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_exponent(dtype: torch.dtype, approximate: str) -> None:
    hold_gelu(dtype, approximate, ["the emulated GPU"])


@pytest.mark.parametrize("exact", [False, True], ids=["tanh", "exact"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tails_and_tiles(emulated: ModuleType, dtype: torch.dtype, exact: bool) -> None:
    """Each element is written once, and nothing beside the tensor, wherever a tensor begins and ends."""
    vector = 16 // dtype.itemsize
    tile = 512 * vector
    for numel in (1, vector - 1, vector, vector + 1, 256 * vector, 256 * vector + 1, tile - 1, tile, 2 * tile + 3):
        for offset in (0, 1):
            x, dy = (torch.randn(numel + offset).to(dtype)[offset:] for _ in range(2))
            whole = torch.full((3, numel + offset + 1), NAN, dtype=dtype)
            y, dx, alone = whole[0, offset:-1], whole[1, offset:-1], whole[2, :1]
            emulated.gelu_forward(input=x, exact=exact, output=y)
            emulated.gelu_backward(doutput=dy, input=x, exact=exact, dinput=dx)
            assert whole[:2, :offset].isnan().all() and whole[:2, -1].isnan().all()
            for i in {0, numel // 2, numel - 1}:  # as an element has in a tensor of its own
                emulated.gelu_forward(input=x[i : i + 1].clone(), exact=exact, output=alone)
                assert alone == y[i]
                emulated.gelu_backward(dy[i : i + 1].clone(), x[i : i + 1].clone(), exact, alone)
                assert alone == dx[i]
            wide = x.double().requires_grad_()
            right = reference.gelu(wide, "none" if exact else "tanh")
            right.backward(dy.double())
            eps = torch.finfo(dtype).eps
            assert wide.grad is not None
            torch.testing.assert_close(y.double(), right.detach(), rtol=eps, atol=4 * eps)
            torch.testing.assert_close(dx.double(), wide.grad, rtol=eps, atol=4 * eps)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_zeros_keep_their_sign(approximate: str) -> None:
    for dtype in DTYPES:
        y = ops.gelu(torch.tensor([0.0, -0.0, -1e4], dtype=dtype), approximate)
        assert y.signbit().tolist() == [False, True, True]
