"""Hooks on saved tensors (checkpoints, offloading): a backward unpacks each once, and derivatives are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from torchweld import ops

SEED, CLASSES = torch.zeros(1, dtype=torch.int64), torch.arange(5)
FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "layer_norm": lambda x, w: ops.layer_norm(x, (8,), w, w),
    "rms_norm": lambda x, w: ops.rms_norm(x, (8,), w, zero_centered_weight=True),
    "add_layer_norm": lambda x, w: torch.stack(ops.add_layer_norm(x, x.sin(), (8,), w, w)).sum(0),
    "add_rms_norm": lambda x, w: ops.add_rms_norm(x, x.sin(), (8,), w, dropout_p=0.3, seed=SEED)[0],
    "new_residual": lambda x, w: ops.add_layer_norm(x, x.sin(), (8,), w)[1] * w,
    "dropout": lambda x, w: ops.dropout(x * w, 0.3, seed=SEED),
    "gelu": lambda x, w: ops.gelu(x * w, "tanh"),
    "swiglu": lambda x, w: ops.swiglu(x, x * w),
    "geglu": lambda x, w: ops.geglu(x * w),
    "rotary_embedding": lambda x, w: torch.cat(ops.rotary_embedding(x, x * w)),
    "cross_entropy": lambda x, w: ops.cross_entropy((x * w)[0, 0], CLASSES, reduction="none"),
    "linear_cross_entropy": lambda x, w: ops.linear_cross_entropy(x[0, 0], (x * w)[0, 1], CLASSES, w[:5], shift=True),
    "attention": lambda x, w: ops.attention(x, x * w, x.sin(), bias=x[..., :5], sinks=w[:2], alibi_slopes=w[2:4]),
    "lse": lambda x, w: ops.attention(x, x * w, x, return_lse=True)[1],
    "sdpa": lambda x, w: ops.scaled_dot_product_attention(x, x * w, x, is_causal=True),
}


def leaves(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(1, 2, 5, 8, generator=generator), torch.rand(8, generator=generator) + 0.5
    return x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()


def derivatives(call: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """First and second ones, of x and w."""
    x, w = leaves(dtype)
    first = torch.autograd.grad(call(x, w).sin().sum(), (x, w), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, w))  # type: ignore[arg-type]
    return [g.detach() for g in (*first, *second)]


def close(ours: list[Tensor], exact: list[Tensor]) -> None:
    for got, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-3 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivatives_through_a_checkpoint(name: str) -> None:
    function = FUNCTIONS[name]
    through = lambda x, w: checkpoint(function, x, w, use_reentrant=False)  # noqa: E731
    close(derivatives(through), derivatives(function, torch.float64))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_reentrant_checkpoint_is_differentiated(name: str) -> None:
    grads = []
    for reentrant, dtype in ((True, torch.float32), (None, torch.float64)):
        x, w = leaves(dtype)
        out = FUNCTIONS[name](x, w) if reentrant is None else checkpoint(FUNCTIONS[name], x, w, use_reentrant=True)
        out.sin().sum().backward()
        assert x.grad is not None and w.grad is not None
        grads.append([x.grad, w.grad])
    close(*grads)


@pytest.mark.parametrize("again", [False, True], ids=["backward", "double backward"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_saved_tensor_is_unpacked_once(name: str, again: bool) -> None:
    unpacked: list[int] = []
    packed: list[Tensor] = []

    def pack(t: Tensor) -> int:
        packed.append(t)
        return len(packed) - 1

    def unpack(index: int) -> Tensor:
        unpacked.append(index)
        return packed[index]

    x, w = leaves()
    with saved_tensors_hooks(pack, unpack):
        out = FUNCTIONS[name](x, w)
    torch.autograd.grad(out.sum(), (x, w), create_graph=again)
    assert unpacked and len(unpacked) == len(set(unpacked))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_hooks_may_give_back_other_strides_and_memory(name: str) -> None:
    def transposed(t: Tensor) -> Any:
        return t.transpose(0, -1).contiguous() if t.dim() > 1 else t.clone()

    def unpack(t: Tensor) -> Tensor:
        return t.transpose(0, -1) if t.dim() > 1 else t

    x, w = leaves()
    expected = torch.autograd.grad(FUNCTIONS[name](x, w).sin().sum(), (x, w))
    for hooks in (saved_tensors_hooks(transposed, unpack), save_on_cpu()):
        with hooks:
            out = FUNCTIONS[name](x, w)
        torch.testing.assert_close(torch.autograd.grad(out.sin().sum(), (x, w)), expected)


def test_masks_and_gates_made_in_inference_mode() -> None:
    """Autograd saves no such tensor: a copy takes its place."""
    x, _ = leaves()
    with torch.inference_mode():
        mask, bias, gate = torch.rand(5, 5) < 0.7, torch.randn(5, 5), torch.randn(1, 2, 5, 8)
    calls: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
        "mask": lambda mask, _, __: ops.scaled_dot_product_attention(x, x, x, mask),
        "folded": lambda mask, _, __: ops.scaled_dot_product_attention(x[0], x[0], x[0], mask),
        "dropout": lambda mask, _, __: ops.attention(x, x, x, bias=mask, dropout_p=0.2, seed=SEED),
        "bias": lambda _, bias, __: ops.attention(x, x, x, bias=bias, softcap=2.0),
        "gate": lambda _, __, gate: ops.swiglu(gate, x),
        "up": lambda _, __, gate: ops.geglu(x, gate),
    }
    made = (mask, bias, gate)
    copies = (mask.clone(), bias.clone(), gate.clone())
    for name, call in calls.items():
        found, expected = (torch.autograd.grad(call(*each).sin().sum(), x)[0] for each in (made, copies))
        assert torch.equal(found, expected), name
