"""Gradients of ops that are called by name: exported programs, and torch.ops.torchweld itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchweld import ops

TARGET = torch.tensor([1, 0, 7, 3, 7, 2])
STARTS = torch.tensor([0, 2, 6], dtype=torch.int32)
SEED = torch.tensor([77])
COS, SIN = torch.rand(6, 4), torch.rand(6, 4)


def _leaves(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape).requires_grad_() for shape in shapes)


def _attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    output, lse = ops.attention(query, key, value, bias=bias, causal=True, return_lse=True)
    return output.sum(-1) * lse


CASES: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "gelu": (ops.gelu, ((6, 8),)),
    "dropout": (lambda x: ops.dropout(x, 0.4, seed=SEED), ((6, 8),)),
    "swiglu": (ops.swiglu, ((6, 8), (6, 8))),
    "geglu packed": (ops.geglu, ((6, 8),)),
    "layer_norm": (lambda x, w, b: ops.layer_norm(x, (8,), w, b), ((6, 8), (8,), (8,))),
    "rms_norm": (lambda x, w: ops.rms_norm(x, (8,), w), ((6, 8), (8,))),
    "add_layer_norm": (
        lambda x, r, w: torch.cat(ops.add_layer_norm(x, r, (8,), w, dropout_p=0.3, seed=SEED)),
        ((6, 8), (6, 8), (8,)),
    ),
    "add_rms_norm": (lambda x, r, w: ops.add_rms_norm(x, r, (8,), w)[0], ((6, 8), (6, 8), (8,))),
    "scaled_dot_product_attention": (ops.scaled_dot_product_attention, ((1, 2, 6, 8), (1, 2, 5, 8), (1, 2, 5, 8))),
    "attention, lse": (_attention, ((1, 2, 6, 8), (1, 2, 6, 8), (1, 2, 6, 8), (2, 6, 6))),
    "attention, packed": (
        lambda q, k, v: ops.attention(q, k, v, cu_seqlens_q=STARTS, cu_seqlens_k=STARTS),
        ((6, 2, 8), (6, 2, 8), (6, 2, 8)),
    ),
    "cross_entropy": (lambda x: ops.cross_entropy(x, TARGET), ((6, 8),)),
    "linear_cross_entropy": (
        lambda x, w, b: ops.linear_cross_entropy(x, w, TARGET, b, softcap=3.0),
        ((6, 8), (9, 8), (9,)),
    ),
    "rotary_embedding": (
        lambda q, k: torch.cat(ops.rotary_embedding(q, k, COS, SIN), 1),
        ((1, 2, 6, 8), (1, 1, 6, 8)),
    ),
}


class Program(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *leaves: Tensor) -> Any:
        return self.function(*leaves)


def gradients(function: Callable[..., Any], leaves: tuple[Tensor, ...], doutput: Tensor) -> list[Tensor]:
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, doutput)]


@pytest.mark.parametrize("recorded", [False, True], ids=["exported for inference", "exported with gradients"])
@pytest.mark.parametrize("name", CASES)
def test_an_exported_program_learns_as_its_function_does(name: str, recorded: bool) -> None:
    function, shapes = CASES[name]
    leaves = _leaves(*shapes)
    given = leaves if recorded else tuple(t.detach() for t in leaves)
    with torch.set_grad_enabled(recorded):
        exported = torch.export.export(Program(function), given)
    assert "torchweld" in str(exported.graph)
    doutput = torch.randn_like(function(*leaves).detach())
    expected = gradients(function, leaves, doutput)
    torch.testing.assert_close(gradients(exported.module(), leaves, doutput), expected, rtol=1e-5, atol=1e-6)
    compiled = torch.compile(exported.module(), backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, leaves, doutput), expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(*leaves), expected[0], rtol=1e-5, atol=1e-6)


def test_an_exported_program_is_trained_on_after_a_save(tmp_path: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8), Program(ops.gelu), nn.Linear(8, 1))
    x = torch.randn(16, 8)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    optimizer = torch.optim.SGD(loaded.parameters(), 0.1)
    losses = []
    for _ in range(20):
        loss = (loaded(x) - x.sum(-1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_tables_of_rotary_embedding_have_gradients_by_name() -> None:
    query, _ = _leaves((1, 2, 6, 8), (1, 1, 6, 8))
    cos, sin = COS.clone().requires_grad_(), SIN.clone().requires_grad_()
    op = torch.ops.torchweld.rotary_embedding
    for inverse in (False, True):
        found, _ = op(query, None, cos, sin, None, 8, False, inverse)
        expected = ops.rotary_embedding(query, None, cos, -sin if inverse else sin)
        for a, b in zip(
            *(torch.autograd.grad(y.square().sum(), (query, cos, sin)) for y in (found, expected)), strict=True
        ):
            torch.testing.assert_close(a, b)
        (back,) = torch.autograd.grad(op(query, None, COS, SIN, None, 8, False, inverse)[0].sum(), query)
        (other,) = torch.autograd.grad(ops.rotary_embedding(query, None, COS, -SIN if inverse else SIN).sum(), query)
        torch.testing.assert_close(back, other)


@pytest.mark.parametrize("name", ["gelu", "layer_norm", "scaled_dot_product_attention", "linear_cross_entropy"])
def test_an_exported_program_has_second_derivatives(name: str) -> None:
    function, shapes = CASES[name]
    leaves = _leaves(*shapes)
    exported = torch.export.export(Program(function), tuple(t.detach() for t in leaves)).module()
    found = []
    for call in (exported, function):
        first = torch.autograd.grad(call(*leaves).square().sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad([g.square().sum() for g in first], leaves))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_a_transform_that_would_lose_the_gradient_is_refused() -> None:
    op = torch.ops.torchweld.gelu_forward
    x = torch.randn(3, 4)
    with pytest.raises(RuntimeError, match=r"^\[gelu_forward\] expected no transform of torch\.func"):
        torch.func.grad(lambda x: op(x).sum())(x)
    torch.testing.assert_close(torch.func.vmap(op)(x), op(x))
