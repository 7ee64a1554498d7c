"""Under autocast our ops give the dtypes that torch's give, on the CPU and, for tensors without memory, on CUDA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from leaves import gradient
from torchweld import nn, ops, reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def rotated(of: Any, x: Tensor) -> Tensor:
    """By half a circle."""
    if of is not ops:
        return -x.view(1, 1, 4, 8)
    turned: Tensor = ops.rotary_embedding(x.view(1, 1, 4, 8), None, -x.new_ones(4, 8), x.new_zeros(4, 8))
    return turned


CALLS: dict[str, Callable[[Any, Tensor, torch.dtype], Tensor]] = {
    "layer_norm": lambda of, x, p: of.layer_norm(x, (8,), x.new_ones(8, dtype=p), x.new_ones(8, dtype=p)),
    "rms_norm": lambda of, x, p: of.rms_norm(x, (8,), x.new_ones(8, dtype=p)),
    "dropout": lambda of, x, p: of.dropout(x, 1.0),
    "gelu": lambda of, x, p: of.gelu(x, approximate="tanh"),
    "swiglu": lambda of, x, p: of.swiglu(x, x) if of is ops else of.silu(x) * x,
    "geglu": lambda of, x, p: of.geglu(x, x) if of is ops else of.gelu(x) * x,
    "rotary_embedding": lambda of, x, p: rotated(of, x),
    "cross_entropy": lambda of, x, p: of.cross_entropy(x, x.new_zeros(4, dtype=torch.int64)),
    "cross_entropy, weighted": lambda of, x, p: of.cross_entropy(
        x, x.new_zeros(4, dtype=torch.int64), x.new_ones(8), reduction="none"
    ),
    "linear_cross_entropy": lambda of, x, p: of.linear_cross_entropy(
        x, torch.linspace(-1, 1, 48, dtype=p, device=x.device).view(6, 8), x.new_zeros(4, dtype=torch.int64)
    ),
    "scaled_dot_product_attention": lambda of, x, p: of.scaled_dot_product_attention(*(x.view(1, 1, 4, 8),) * 3),
}


@contextmanager
def autocast(device: str, dtype: torch.dtype) -> Iterator[None]:
    """torch.autocast, also of a device that is not here."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("target", [BF16, F16], ids=str)
def test_the_cpu_gives_torchs_dtypes(name: str, dtype: torch.dtype, target: torch.dtype) -> None:
    x, parameters = torch.randn(4, 8, dtype=dtype, requires_grad=True), F32 if dtype == F32 else dtype
    with autocast("cpu", target):
        ours, theirs = (CALLS[name](of, x, parameters) for of in (ops, F))
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    (grad,) = torch.autograd.grad(ours.float().sum(), x)
    assert grad.dtype == dtype and grad.isfinite().all()


@pytest.mark.parametrize("name", [n for n in CALLS if n != "dropout"])  # its random bits ask for a device
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_cuda_gives_torchs_dtypes(name: str, dtype: torch.dtype) -> None:
    with FakeTensorMode(), autocast("cuda", F16):
        x = torch.empty(4, 8, device="cuda", dtype=dtype)
        if name == "scaled_dot_product_attention":  # torch's own asks for a driver
            assert CALLS[name](ops, x, F32).dtype == F16
        else:
            assert CALLS[name](ops, x, F32).dtype == CALLS[name](F, x, dtype).dtype


def test_losses_are_not_rounded() -> None:
    x, target = torch.randn(64, 100).bfloat16(), torch.randint(100, (64,))
    exact = F.cross_entropy(x.double(), target, reduction="none")
    with torch.autocast("cpu", BF16):
        torch.testing.assert_close(ops.cross_entropy(x, target, reduction="none").double(), exact, rtol=1e-6, atol=1e-6)


def test_what_runs_on_the_definition_is_not_rounded_on_the_way() -> None:
    q = torch.randn(1, 2, 16, 8)
    out = reference.attention(q, q, q)
    with torch.autocast("cpu", BF16):
        torch.testing.assert_close(reference.attention(q, q, q), out, rtol=0, atol=0)


def test_a_model_trains_with_float32_weights() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), nn.LayerNorm(8), nn.RMSNorm(8))
    with torch.autocast("cpu", BF16):
        out = model(torch.randn(4, 8))
        loss = ops.cross_entropy(out, torch.tensor([0, 1, 2, 3]))
    assert (out.dtype, loss.dtype) == (BF16, F32)
    loss.backward()
    assert all(gradient(p).dtype == F32 and gradient(p).any() for p in model.parameters())
