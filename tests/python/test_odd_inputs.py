"""What no case list has: lazily negated tensors, tracers, tensors without memory, arguments that are no tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import torchweld
from torchweld import ops, optim, reference

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
    "cross_entropy": lambda t: ops.cross_entropy(t[0], CLASSES),
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
        lambda: ops.cross_entropy(make(5, COLS), CLASSES),
        lambda: ops.attention(q, make(1, 2, 5, COLS), q),
        lambda: optim.SGD([weight]).step(),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="expected a tensor with memory, but got one whose storage is empty"):
            call()


# ---- Arguments that do not fit, or only nearly

Q, LENGTHS = torch.ones(1, 2, 5, 8), torch.tensor([0, 1], dtype=torch.int32)


def odd(value: Any) -> Any:
    """`value`, which no type checker would let pass as an argument."""
    return value


WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: ops.layer_norm(odd(None), (8,)),
        TypeError,
        "[layer_norm] input: expected a torch.Tensor, but got NoneType",
    ),
    (lambda: ops.rms_norm(odd([1.0]), (1,)), TypeError, "[rms_norm] input: expected a torch.Tensor, but got list"),
    (lambda: ops.gelu(odd(Q.numpy()), "tanh"), TypeError, "[gelu] input: expected a torch.Tensor, but got ndarray"),
    (lambda: ops.cross_entropy(Q[0, 0], odd([0] * 5)), TypeError, "[cross_entropy] target: expected a torch.Tensor"),
    (lambda: ops.attention(Q, odd(None), Q), TypeError, "[attention] key: expected a torch.Tensor, but got NoneType"),
    (lambda: ops.attention(Q, Q, Q, sinks=odd([0.0, 0.0])), TypeError, "[attention] sinks: expected a torch.Tensor"),
    (
        lambda: ops.attention(Q, Q, Q, dropout_p=0.5, seed=odd(1)),
        TypeError,
        "[attention] seed: expected a torch.Tensor",
    ),
    (lambda: ops.attention(Q, Q, Q, window=odd(3)), ValueError, "[attention] window: expected (left, right)"),
    (
        lambda: ops.attention(Q[0], Q[0], Q[0], cu_seqlens_q=LENGTHS, cu_seqlens_k=LENGTHS),
        ValueError,
        "[attention] cu_seqlens_q: expected the number of rows, 2, as its last element, but got 1",
    ),
    (lambda: ops.add_rms_norm(Q, odd(None), (8,)), TypeError, "[add_rms_norm] residual: expected a torch.Tensor"),
    (
        lambda: ops.layer_norm(Q, (8,), None, torch.ones(8, dtype=torch.int32)),
        TypeError,
        "[layer_norm] bias: expected a floating-point dtype, but got torch.int32",
    ),
    (
        lambda: ops.cross_entropy(torch.ones(5, 8, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)),
        TypeError,
        "[cross_entropy] input: expected a floating-point dtype, but got torch.int64",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG, ids=[message for _, _, message in WRONG])
def test_what_does_not_fit_is_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith(message)


def test_heads_of_nothing_weigh_all_values_alike() -> None:
    q, value = x(1, 2, 5, 0), x(1, 2, 5, 8)
    expected = value.mean(2, keepdim=True).expand_as(value)
    for module in (ops, reference):
        torch.testing.assert_close(module.attention(q, q, value), expected)
        torch.testing.assert_close(module.scaled_dot_product_attention(q, q, value), expected)


def test_classes_of_one_byte_are_classes() -> None:
    logits = x(5, 24)
    expected = torch.nn.functional.cross_entropy(logits, CLASSES.to(torch.uint8))
    torch.testing.assert_close(ops.cross_entropy(logits, CLASSES.to(torch.uint8)), expected)


def test_a_bias_without_dimensions_is_added_everywhere() -> None:
    q, bias = x(1, 2, 5, 8), torch.tensor(3.0, requires_grad=True)
    out: Any = ops.attention(q, q, q, bias=bias)
    torch.testing.assert_close(out, ops.attention(q, q, q))  # softmax does not see a constant
    out.sum().backward()
    assert bias.grad is not None and bias.grad.shape == () and abs(bias.grad) < 1e-5


def test_tab_completion_finds_all_public_names() -> None:
    assert set(torchweld.__all__) <= set(dir(torchweld))
