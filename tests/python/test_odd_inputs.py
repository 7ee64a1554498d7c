"""What no case list has: lazily negated tensors, tracers, tensors without memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import torchweld
from torchweld import ops, optim

COLS = 24
CLASSES = torch.arange(5) * 4


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# ---- z.conj().imag is a view whose sign is a flag of the tensor, of which DLPack says nothing.

NEGATED: dict[str, Callable[[Tensor], Any]] = {
    "layer_norm": lambda t: ops.layer_norm(t, (COLS,)),
    "layer_norm weight": lambda t: ops.layer_norm(x(2, 5, COLS), (COLS,), t[0, 0]),
    "layer_norm bias": lambda t: ops.layer_norm(x(2, 5, COLS), (COLS,), None, t[0, 0]),
    "rms_norm": lambda t: ops.rms_norm(t, (COLS,)),
    "add_layer_norm x": lambda t: ops.add_layer_norm(t, x(2, 5, COLS), (COLS,))[0],
    "add_layer_norm residual": lambda t: ops.add_layer_norm(x(2, 5, COLS), t, (COLS,))[1],
    "gelu": lambda t: ops.gelu(t, "tanh"),
    "swiglu gate": lambda t: ops.swiglu(t, x(2, 5, COLS)),
    "swiglu up": lambda t: ops.swiglu(x(2, 5, COLS), t),
    "geglu packed": ops.geglu,
    "rotary_embedding query": lambda t: ops.rotary_embedding(t[None]),
    "rotary_embedding key": lambda t: ops.rotary_embedding(x(1, 2, 5, COLS), t[None])[1],
    "cross_entropy": lambda t: ops.cross_entropy(t[0], CLASSES),
    "linear_cross_entropy input": lambda t: ops.linear_cross_entropy(t[0], x(COLS, COLS), CLASSES),
    "linear_cross_entropy weight": lambda t: ops.linear_cross_entropy(x(5, COLS), t[0], CLASSES // 4, t[1, :, 0]),
    "query": lambda t: ops.attention(t[None], x(1, 2, 5, COLS), x(1, 2, 5, COLS)),
    "key": lambda t: ops.attention(x(1, 2, 5, COLS), t[None], x(1, 2, 5, COLS)),
    "value": lambda t: ops.scaled_dot_product_attention(x(1, 2, 5, COLS), x(1, 2, 5, COLS), t[None]),
    "bias": lambda t: ops.attention(*(x(1, 2, 5, COLS),) * 3, bias=t[:, :, :5]),
    "sinks": lambda t: ops.attention(*(x(1, 2, 5, COLS),) * 3, sinks=t[:, 0, 0]),
}


@pytest.mark.parametrize("name", NEGATED)
def test_a_lazily_negated_tensor_is_negated(name: str) -> None:
    results = []
    for negate in (torch._neg_view, torch.neg):
        leaf = x(2, 5, COLS).requires_grad_()
        out = NEGATED[name](negate(leaf))
        (grad,) = torch.autograd.grad(out, leaf, negate(torch.ones_like(out)))
        results.append((NEGATED[name](negate(leaf.detach())), out, grad))
    for lazy, eager in zip(*results, strict=True):
        torch.testing.assert_close(lazy, eager, rtol=0, atol=0)


def test_a_lazily_negated_gradient_steps_a_parameter_as_its_value_does() -> None:
    for shape in ((5,), (1,), ()):
        gradient, param = x(5)[: math.prod(shape)].view(shape), x(5)[: math.prod(shape)].view(shape) * 2
        for start in (param.clone(), torch.complex(param, -param).conj().imag):
            lazy, grads = start, [torch.complex(gradient, -gradient).conj().imag]
            assert grads[0].is_neg()
            torch.testing.assert_close(ops.grad_norm(grads), gradient.norm())
            ops.sgd_([lazy], grads, [], lr=1.0, zero_grads=True)
            torch.testing.assert_close(lazy, param - gradient)
            assert not grads[0].any()


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_a_lazily_conjugated_gradient_steps_a_parameter_as_its_value_does(name: str) -> None:
    results = []
    for module in (torch.optim, optim):
        p = torch.nn.Parameter(torch.complex(x(5), x(5)))
        p.grad = torch.complex(x(5), x(5) + 1).conj()
        if module is torch.optim:
            p.grad = p.grad.resolve_conj()
        getattr(module, name)([p], lr=0.1).step()
        results.append(p)
    torch.testing.assert_close(*results)


# ---- Tracers and tensors without memory


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
def test_a_traced_module_computes_what_it_did() -> None:
    encoder = torch.nn.TransformerEncoderLayer(COLS, 2, 32, dropout=0.0, batch_first=True)
    torchweld.patch(encoder)
    traced = torch.jit.trace(encoder, x(2, 5, COLS))
    torch.testing.assert_close(traced(-x(2, 5, COLS)), encoder(-x(2, 5, COLS)))


def test_a_patched_encoder_is_exported_with_dynamic_sizes() -> None:
    encoder = torch.nn.TransformerEncoderLayer(COLS, 2, 32, batch_first=True).eval()
    torchweld.patch(encoder)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("rows")}
    program = torch.export.export(encoder, (x(3, 7, COLS),), dynamic_shapes=(sizes,))
    torch.testing.assert_close(program.module()(x(2, 5, COLS)), encoder(x(2, 5, COLS)))
    with torchweld.use_backend("reference"):
        program = torch.export.export(encoder, (x(3, 7, COLS),))
    assert not any("torchweld" in str(node.target) for node in program.graph.nodes)  # loads without torchweld
    torch.testing.assert_close(program.module()(x(3, 7, COLS)), encoder(x(3, 7, COLS)))


def test_meta_tensors_have_shapes() -> None:
    with torch.device("meta"):
        encoder = torch.nn.TransformerEncoderLayer(COLS, 2, 32, batch_first=True)
        q, logits = torch.randn(2, 3, 5, COLS), torch.randn(5, 7, requires_grad=True)
        classes = torch.zeros(5, dtype=torch.int64)
    torchweld.patch(encoder)
    assert encoder(q[0]).shape == q[0].shape
    assert ops.scaled_dot_product_attention(q, q, q, is_causal=True).shape == q.shape
    ops.cross_entropy(logits, classes).backward()
    ops.linear_cross_entropy(logits, logits[:4], classes, reduction="sum").backward()
    assert logits.grad is not None and logits.grad.is_meta


@pytest.mark.parametrize("optimizer", [optim.AdamW, optim.Adam, optim.SGD])
def test_fake_parameters_are_stepped(optimizer: Any) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        weight = torch.nn.Parameter(torch.randn(3))
        steps = optimizer([weight])
        weight.sum().backward()
        steps.step()
        assert weight._version > 0


def test_the_default_device_is_not_that_of_the_state() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    with torch.device("meta"):
        optim.AdamW([weight], lr=0.5, max_grad_norm=1.0).step()
    assert weight.max() < 0.6


# ---- Tensors whose memory is gone: an error, where a kernel would end the interpreter


def freed(*shape: int) -> Tensor:
    whole = torch.ones(2 + math.prod(shape))
    view = whole[2:].view(shape)
    whole.untyped_storage().resize_(0)
    return view


@pytest.mark.parametrize("make", [freed, lambda *shape: torch._efficientzerotensor(shape)], ids=["freed", "ZeroTensor"])
def test_a_tensor_without_memory_is_refused(make: Callable[..., Tensor]) -> None:
    leaf, q = x(5, COLS).requires_grad_(), x(1, 2, 5, COLS)
    weight = torch.nn.Parameter(x(3))
    weight.grad = make(3)
    calls: list[Callable[[], Any]] = [
        lambda: ops.layer_norm(make(5, COLS), (COLS,)),
        lambda: ops.layer_norm(x(5, COLS), (COLS,), make(COLS)),
        lambda: ops.add_rms_norm(x(5, COLS), make(5, COLS), (COLS,)),
        lambda: torch.autograd.grad(ops.layer_norm(leaf, (COLS,)), leaf, make(5, COLS)),
        lambda: ops.gelu(make(5), "tanh"),
        lambda: ops.swiglu(x(5, COLS), make(5, COLS)),
        lambda: ops.rotary_embedding(q, make(1, 2, 5, COLS)),
        lambda: ops.cross_entropy(make(5, COLS), CLASSES),
        lambda: ops.linear_cross_entropy(x(5, COLS), make(COLS, COLS), CLASSES),
        lambda: ops.attention(q, make(1, 2, 5, COLS), q),
        lambda: optim.SGD([weight]).step(),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="expected a tensor with memory, but got one whose storage is empty"):
            call()
