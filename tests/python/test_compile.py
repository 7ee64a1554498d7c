"""torch.compile, torch.export and activation checkpointing, of every op and of modules: one graph, the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from leaves import gradient
from torchweld import nn, ops
from torchweld.models import CONFIGS, GPT2

pytestmark = pytest.mark.slow

W, B, SEED = torch.randn(24), torch.randn(24), torch.tensor([7])
IDS = torch.arange(20) + 10
OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "layer_norm": lambda x, y: ops.layer_norm(x, (24,), W, B),
    "add_layer_norm": lambda x, y: torch.cat(ops.add_layer_norm(x, y, (24,), W, B)),
    "rms_norm": lambda x, y: ops.rms_norm(x, (24,), W),
    "add_rms_norm": lambda x, y: torch.cat(ops.add_rms_norm(x, y, (24,), W)),
    "dropout": lambda x, y: ops.dropout(x, 0.3, seed=SEED) + y,
    "gelu": lambda x, y: ops.gelu(x, "tanh"),
    "swiglu": lambda x, y: torch.cat((ops.swiglu(x, y), ops.swiglu(x)), -1),
    "geglu": lambda x, y: torch.cat((ops.geglu(x, y, approximate="tanh"), ops.geglu(x)), -1),
    "rotary_embedding": lambda x, y: torch.cat(ops.rotary_embedding(x, y)),
    "rotary_embedding, by positions": lambda x, y: torch.cat(
        ops.rotary_embedding(x, y[:, :1], W.expand(30, 24), B.expand(30, 24), position_ids=IDS[: x.shape[2]]), 1
    ),
    "cross_entropy": lambda x, y: ops.cross_entropy(x.flatten(0, -2), y.flatten(0, -2).argmax(-1), label_smoothing=0.1),
    "linear_cross_entropy": lambda x, y: ops.linear_cross_entropy(x, y[0, 0], x.argmax(-1) % y.shape[2], shift=True),
    "linear_cross_entropy, each row": lambda x, y: ops.linear_cross_entropy(
        x, y[0, 0], x.argmax(-1) % y.shape[2], y[0, 1, :, 0], reduction="none", softcap=3.0
    ),
    "scaled_dot_product_attention": lambda x, y: ops.scaled_dot_product_attention(x, y, y, is_causal=True),
    "attention": lambda x, y: ops.attention(x, y, y, causal=True, window=(5, 0), softcap=9.0, return_lse=True)[0],
}


def gradients(function: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    """The output and the gradients of what it depends on."""
    out = function(*leaves)
    found = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
    return [out, *(g for g in found if g is not None)]


def inputs(batch: int, rows: int) -> list[Tensor]:
    return [torch.randn(batch, 2, rows, 24, requires_grad=True) for _ in range(2)]


@pytest.mark.parametrize("name", OPS)
def test_ops_compile_to_one_graph_for_all_shapes(name: str) -> None:
    """Forward, backward and inference, between operators that a compiler would fuse; no size asks for another graph."""
    graphs: list[Any] = []

    def function(x: Tensor, y: Tensor) -> Tensor:
        return OPS[name](x.sin(), y.cos()).tanh()

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        graphs.append(graph)
        return aot_eager(graph, example)

    torch._dynamo.reset()
    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    counts = []
    for batch, rows in ((3, 5), (4, 9), (5, 17)):
        leaves = inputs(batch, rows)
        for got, expected in zip(gradients(compiled, *leaves), gradients(function, *leaves), strict=True):
            torch.testing.assert_close(got, expected)
        counts.append(len(graphs))
    assert counts[1] == counts[2] <= 2
    with torch.no_grad():
        torch.testing.assert_close(compiled(*leaves), function(*leaves))


def test_inductor_trains_a_transformer_layer() -> None:
    torch.manual_seed(0)
    layer = torch.nn.ModuleDict({"norm": nn.LayerNorm(24), "mix": nn.MultiheadAttention(24, 2, batch_first=True)})

    def loss(x: Tensor) -> Tensor:
        normed = layer["norm"](x)
        return (ops.gelu(layer["mix"](normed, normed, normed, need_weights=False)[0], "tanh") + x).square().mean()

    compiled = torch.compile(loss, fullgraph=True)
    x = torch.randn(3, 7, 24)
    results = []
    for function in (compiled, loss):
        layer.zero_grad()
        value = function(x)
        value.backward()
        results.append([value, *(gradient(p).clone() for p in layer.parameters())])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gpt2_compiles_to_one_graph(dropout: float) -> None:
    config = replace(CONFIGS["tiny"], dropout=dropout, n_positions=32)
    model = GPT2(config)
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    tokens = torch.randint(config.vocab_size, (2, 33))
    compiled(tokens[:, :-1], tokens[:, 1:]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if dropout == 0.0:
        grads = [gradient(p).clone() for p in model.parameters()]
        model.zero_grad()
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        torch.testing.assert_close(grads, [p.grad for p in model.parameters()])


def test_export_keeps_the_ops_and_takes_other_sizes() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.rms = nn.LayerNorm(24), nn.RMSNorm(24)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            normed, total = ops.add_layer_norm(self.norm(x), self.rms(y), (24,), W, B)
            return ops.gelu(ops.scaled_dot_product_attention(normed, total, total), "tanh")

    block = Block().eval()
    batch, rows = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("rows", min=2, max=4096)
    shapes = {"x": {0: batch, 2: rows}, "y": {0: batch, 2: rows}}
    with torch.no_grad():
        program = torch.export.export(block, tuple(inputs(2, 5)), dynamic_shapes=shapes)
        used = {str(node.target) for node in program.graph.nodes if "torchweld" in str(node.target)}
        assert {name.split(".")[1] for name in used} >= {"layer_norm", "gelu_forward", "attention"}
        other = inputs(5, 11)
        torch.testing.assert_close(program.module()(*other), block(*other))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_checkpointing_recomputes_the_same(dropout: float, use_reentrant: bool) -> None:
    """Dropout too: the seed comes from torch's generator, whose state checkpointing restores."""

    def block(x: Tensor, y: Tensor) -> Tensor:
        normed, total = ops.add_layer_norm(x, y, (24,), W, B)
        return ops.gelu(ops.scaled_dot_product_attention(normed, total, total, dropout_p=dropout), "tanh")

    leaves, results = inputs(2, 9), []
    for function in (block, lambda *args: checkpoint(block, *args, use_reentrant=use_reentrant)):
        torch.manual_seed(5)
        results.append(gradients_by_backward(function, *leaves))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


def gradients_by_backward(function: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    """As `gradients`, by the call that reentrant checkpointing allows."""
    for leaf in leaves:
        leaf.grad = None
    out = function(*leaves)
    out.square().sum().backward()
    return [out, *map(gradient, leaves)]
