"""torch.fx, torch.jit and Dynamo with dynamic shapes see in drop-ins what they see in the layers of torch.nn."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchweld
from torchweld import ops
from torchweld.nn.twins import TWINS

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


def encoder_layer() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(16, 2, 32, 0.0, nn.GELU(), batch_first=True)


class Net(nn.Module):
    """Every layer that has a drop-in."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(encoder_layer(), 1, enable_nested_tensor=False)
        self.layer, self.norm, self.gelu, self.drop = encoder_layer(), nn.LayerNorm(16), nn.GELU(), nn.Dropout(0.3)
        self.rms, self.attention = nn.RMSNorm(16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.decoder = nn.TransformerDecoderLayer(16, 2, 32, 0.0, batch_first=True)
        self.decoders = nn.TransformerDecoder(self.decoder, 1)
        self.whole = nn.Transformer(16, 2, 1, 1, 32, 0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.rms(self.drop(self.gelu(self.norm(self.layer(self.encoder(x))))))
        y = self.attention(y, y, y, need_weights=False)[0]
        found: Tensor = self.whole(self.decoders(self.decoder(tgt=y, memory=x), x), x)
        return found


def make() -> tuple[Any, Any]:
    """A model as it is, and patched."""
    torch.manual_seed(0)
    model = Net()
    patched = copy.deepcopy(model)
    torchweld.patch(patched)
    assert {*TWINS.values()} - {type(m) for m in patched.modules()} == set()
    return model, patched


@pytest.mark.parametrize("training", [False, True])
def test_a_symbolic_trace_has_the_same_nodes(training: bool) -> None:
    model, patched = make()
    traces = [torch.fx.symbolic_trace(m.train(training)) for m in (model, patched)]
    nodes = [[(node.op, str(node.target)) for node in trace.graph.nodes] for trace in traces]
    assert nodes[0] == nodes[1] and ("call_module", "drop") in nodes[1]
    assert type(traces[1].layer) is torchweld.nn.TransformerEncoderLayer
    expected, ours = (trace.eval()(X) for trace in traces)  # dropout follows the mode
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_alone_is_traced_into(kind: Any) -> None:
    trace = torch.fx.symbolic_trace(TWINS[kind](16))
    torch.testing.assert_close(trace(X), kind(16)(X))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_compiles_the_layers_of_torch() -> None:
    model, patched = make()
    models = [nn.Sequential(m.layer, m.norm, m.gelu, m.drop, m.rms, m.encoder).eval() for m in (model, patched)]
    scripts = [torch.jit.script(m) for m in models]
    expected, ours = (script(X) for script in scripts)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(models[1](X), expected, rtol=1e-4, atol=1e-5)
    scripts[1](X).sum().backward()
    assert models[1][1].weight.grad is not None  # the parameters are the model's
    stream = io.BytesIO()
    torch.jit.save(scripts[1], stream)
    stream.seek(0)
    torch.testing.assert_close(torch.jit.load(stream)(X), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_drop_in_alone_is_scripted_and_keeps_its_class() -> None:
    layer = torchweld.nn.LayerNorm(16)
    torch.testing.assert_close(torch.jit.script(layer)(X), nn.LayerNorm(16)(X))
    assert type(layer) is torchweld.nn.LayerNorm


class Twice(nn.Module):
    """Two of a layer: their numbers are read in two parts of the graph."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.norms = kind, nn.ModuleList(torchweld.nn.LayerNorm(16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm in self.norms:
            if self.kind == "layer_norm":
                x = norm(x)
            elif self.kind == "rms_norm":
                x = ops.rms_norm(x, (16,), norm.weight)
            elif self.kind == "add_layer_norm":
                x = ops.add_layer_norm(x, x, (16,), norm.weight, norm.bias)[0]
            else:
                x = ops.scaled_dot_product_attention(x, x, x)
        return x


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm", "add_layer_norm", "attention"])
def test_two_of_a_kind_compile_with_dynamic_shapes(kind: str) -> None:
    torch._dynamo.reset()
    model = Twice(kind)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (5, 3):
        found = []
        for function in (compiled, model):
            x = torch.randn(2, 2, rows, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
            y = function(x)
            found.append((y, *torch.autograd.grad(y.square().sum(), x)))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


class Chosen(nn.Module):
    """Rows whose number only the data tells."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.drop = kind, torchweld.nn.Dropout(0.5)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x[mask]
        return ops.cross_entropy(x, x.argmax(-1)) if self.kind == "loss" else ops.dropout(self.drop(x), 0.5)


@pytest.mark.parametrize("kind", ["loss", "dropout"])
def test_a_number_of_rows_that_is_not_known(kind: str) -> None:
    torch._dynamo.reset()
    model, x = Chosen(kind), torch.randn(40, 16)
    masks = [torch.arange(40) % 3 == 0, torch.zeros(40, dtype=torch.bool)]
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        exported = torch.export.export(model, (x, masks[0])).module()
        for mask in masks:
            leaf = x.clone().requires_grad_()
            found = compiled(leaf, mask)
            if kind == "loss":
                for each in (found, exported(x, mask)):
                    torch.testing.assert_close(each, model(x, mask), equal_nan=True)
                continue
            (grad,) = torch.autograd.grad(found.sum(), leaf)
            torch.testing.assert_close(grad[mask] * x[mask], found.detach())
            assert exported(x, mask).shape == found.shape


class Heads(nn.Module):
    """A layer that cuts rows into heads, and a loss of what it makes; of a number of rows that only the data tells."""

    def __init__(self, kind: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind = kind
        self.layer = torchweld.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.rotary = torchweld.nn.RotaryEmbedding(8)
        self.head = nn.Linear(16, 12)
        self.to(dtype)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x[mask]
        if self.kind == "encoder":
            return self.layer(x[None])[0]
        if self.kind == "rotary":
            heads = self.rotary(x.view(1, -1, 2, 8).transpose(1, 2))
            return heads.transpose(1, 2).reshape(-1, 16)
        target = torch.arange(x.shape[0]) % 12
        return ops.linear_cross_entropy(x, self.head.weight, target, self.head.bias, reduction=self.kind)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("encoder", torch.float32),
        ("rotary", torch.float32),
        ("mean", torch.float32),
        ("mean", torch.float16),
        ("none", torch.bfloat16),
    ],
)
def test_heads_and_a_loss_of_rows_whose_number_is_not_known(kind: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    model, x = Heads(kind, dtype), torch.randn(40, 16).to(dtype)
    masks = [torch.arange(40) % 3 == 0, torch.arange(40) == 7, torch.zeros(40, dtype=torch.bool)]
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        exported = torch.export.export(model.eval(), (x, masks[0])).module()
        for mask in masks:
            found = []
            for function in (compiled, model):
                leaf = x.clone().requires_grad_()
                y = function(leaf, mask)
                found.append((y.detach(), *torch.autograd.grad(y.sum(), leaf)))
            torch.testing.assert_close(*found, equal_nan=True)
            with torch.no_grad():
                torch.testing.assert_close(exported(x, mask), found[1][0], equal_nan=True)
