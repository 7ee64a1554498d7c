"""Arguments that do not fit, or only nearly: the text of every error, and what is served all the same."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

import torchweld
from torchweld import ops, reference
from torchweld.ops._norm import Norm

COLS = 24
CLASSES = torch.arange(5) * 4


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


Q, LENGTHS = torch.ones(1, 2, 5, 8), torch.tensor([0, 1], dtype=torch.int32)


untyped: Any = torchweld  # for calls that are wrong on purpose, as a type checker would say


def adamw(**options: Any) -> None:
    lists: Any = ([torch.ones(2)], [torch.ones(2)], [torch.zeros(2)], [torch.zeros(2)], [], [torch.zeros(())])
    usual: dict[str, Any] = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0}
    ops.adamw_(*lists, **{**usual, **options})


WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: untyped.ops.layer_norm(None, (8,)),
        TypeError,
        "[layer_norm] input: expected a torch.Tensor, but got NoneType",
    ),
    (lambda: untyped.ops.rms_norm([1.0], (1,)), TypeError, "[rms_norm] input: expected a torch.Tensor, but got list"),
    (lambda: untyped.ops.gelu(Q.numpy(), "tanh"), TypeError, "[gelu] input: expected a torch.Tensor, but got ndarray"),
    (lambda: untyped.ops.swiglu(Q, [1.0]), TypeError, "[swiglu] up: expected a torch.Tensor, but got list"),
    (lambda: untyped.ops.geglu([1.0]), TypeError, "[geglu] gate: expected a torch.Tensor, but got list"),
    (lambda: untyped.ops.rotary_embedding(Q, Q, 1, 2), TypeError, "[rotary_embedding] cos: expected a torch.Tensor"),
    (lambda: untyped.ops.cross_entropy(Q[0, 0], [0] * 5), TypeError, "[cross_entropy] target: expected a torch.Tensor"),
    (
        lambda: untyped.ops.linear_cross_entropy(Q[0, 0], None, torch.zeros(5, dtype=torch.int64)),
        TypeError,
        "[linear_cross_entropy] weight: expected a torch.Tensor, but got NoneType",
    ),
    (
        lambda: untyped.ops.attention(Q, None, Q),
        TypeError,
        "[attention] key: expected a torch.Tensor, but got NoneType",
    ),
    (lambda: untyped.ops.attention(Q, Q, Q, sinks=[0.0, 0.0]), TypeError, "[attention] sinks: expected a torch.Tensor"),
    (
        lambda: untyped.ops.attention(Q, Q, Q, dropout_p=0.5, seed=1),
        TypeError,
        "[attention] seed: expected a torch.Tensor",
    ),
    (lambda: untyped.ops.attention(Q, Q, Q, window=3), ValueError, "[attention] window: expected (left, right)"),
    (
        lambda: untyped.ops.attention(Q[0], Q[0], Q[0], cu_seqlens_q=LENGTHS, cu_seqlens_k=LENGTHS),
        ValueError,
        "[attention] cu_seqlens_q: expected the number of rows, 2, as its last element, but got 1",
    ),
    (
        lambda: untyped.ops.layer_norm(Q, 8),
        TypeError,
        "[layer_norm] normalized_shape: expected a tuple of integers, but got 8; write (8,)",
    ),
    (
        lambda: untyped.ops.rms_norm(Q, (8.0,)),
        TypeError,
        "[rms_norm] normalized_shape: expected a tuple of integers, but",
    ),
    (lambda: untyped.ops.layer_norm(Q, (8,), eps=None), TypeError, "[layer_norm] eps: expected a number, but got None"),
    (
        lambda: untyped.ops.rms_norm(Q, (8,), eps="x"),
        TypeError,
        "[rms_norm] eps: expected a number or None, but got 'x'",
    ),
    (
        lambda: untyped.ops.rms_norm(Q, (8,), zero_centered_weight=torch.ones(2)),
        TypeError,
        "[rms_norm] zero_centered_weight: expected a bool, but got Tensor",
    ),
    (
        lambda: untyped.ops.layer_norm(Q, (8,), torch.ones(8).to_sparse()),
        TypeError,
        "[layer_norm] weight: expected a dense tensor, but got a sparse_coo one; convert it with x.to_dense()",
    ),
    (
        lambda: untyped.ops.layer_norm(Q, (8,), torch.nested.as_nested_tensor([torch.ones(8)], layout=torch.jagged)),
        TypeError,
        "[layer_norm] weight: expected a dense tensor, but got a nested one",
    ),
    (
        lambda: untyped.ops.layer_norm(Q, (8,), torch.ones(8, device="meta")),
        ValueError,
        "[layer_norm] weight: expected a tensor on cpu, but got meta; move it with .to()",
    ),
    (
        lambda: untyped.ops.add_layer_norm(Q, Q[0], (8,)),
        RuntimeError,
        "[add_layer_norm] residual: expected x's shape [1, 2, 5, 8], but got [2, 5, 8]",
    ),
    (
        lambda: untyped.ops.add_layer_norm(Q, torch.nested.as_nested_tensor([Q[0, 0]] * 2, layout=torch.jagged), (8,)),
        TypeError,
        "[add_layer_norm] residual: expected a dense tensor, but got a nested one",
    ),
    (
        lambda: untyped.ops.attention(Q, torch.nested.as_nested_tensor([Q[0, 0]] * 2, layout=torch.jagged), Q),
        TypeError,
        "[attention] key: expected a dense tensor, but got a nested one",
    ),
    (
        lambda: untyped.ops.attention(Q, Q, Q, causal="yes"),
        TypeError,
        "[attention] causal: expected a bool, but got 'yes'",
    ),
    (
        lambda: untyped.ops.attention(Q, Q, Q, scale=1j),
        TypeError,
        "[attention] scale: expected a number or None, but",
    ),
    (
        lambda: untyped.ops.attention(Q, Q, Q, max_seqlen_q=2**63),
        ValueError,
        "[attention] max_seqlen_q: expected an integer",
    ),
    (
        lambda: untyped.ops.scaled_dot_product_attention(Q, Q[:, :, :, :4], Q),
        RuntimeError,
        "[scaled_dot_product_attention] key: expected query's head size 8, but got 4",
    ),
    (
        lambda: untyped.ops.gelu(Q.to(torch.float8_e4m3fn)),
        TypeError,
        "[gelu] input: expected a floating-point dtype of 16 bits or more, but got torch.float8_e4m3fn; convert it",
    ),
    (
        lambda: untyped.ops.cross_entropy(Q[0, 0].to(torch.float8_e5m2), torch.zeros(5, dtype=torch.int64)),
        TypeError,
        "[cross_entropy] input: expected a floating-point dtype of 16 bits or more, but got torch.float8_e5m2",
    ),
    (
        lambda: untyped.ops.cross_entropy(Q[0, 0], torch.zeros(4)),
        ValueError,
        "[cross_entropy] target: expected shape [5] for classes, or [5, 8] for probabilities, but got",
    ),
    (
        lambda: untyped.ops.cross_entropy(Q[0, 0], torch.zeros(5, dtype=torch.int64), torch.ones(7)),
        RuntimeError,
        "[cross_entropy] weight: expected shape [8], but got [7]",
    ),
    (
        lambda: untyped.ops.cross_entropy(Q[0, 0], torch.zeros(5, dtype=torch.int64), ignore_index=1.5),
        TypeError,
        "[cross_entropy] ignore_index: expected an integer, but got 1.5",
    ),
    (
        lambda: untyped.ops.add_rms_norm(Q, Q, (8,), dropout_p=0.5, seed=torch.ones(1).to_sparse()),
        TypeError,
        "[add_rms_norm] seed: expected a dense tensor, but got a sparse_coo one",
    ),
    (lambda: adamw(found_inf=torch.ones(1).to_sparse()), TypeError, "[adamw_] found_inf: expected a dense tensor, but"),
    (lambda: untyped.ops.grad_norm(["x"]), TypeError, "[grad_norm] grads[0]: expected a torch.Tensor, but got str"),
    (lambda: untyped.ops.grad_norm("x"), TypeError, "[grad_norm] grads: expected a list of tensors, but got str"),
    (lambda: adamw(beta2="x"), TypeError, "[adamw_] beta2: expected a number, but got 'x'"),
    (lambda: adamw(weight_decay=None), TypeError, "[adamw_] weight_decay: expected a number, but got None"),
    (lambda: adamw(lr="x"), TypeError, "[adamw_] lr: expected a number or a torch.Tensor of one element, but got 'x'"),
    (lambda: adamw(max_grad_norm=[1]), TypeError, "[adamw_] max_grad_norm: expected a number or None, but got [1]"),
    (lambda: adamw(amsgrad=1.0), TypeError, "[adamw_] amsgrad: expected a bool, but got 1.0"),
    (lambda: adamw(rounding_seed=0.5), TypeError, "[adamw_] rounding_seed: expected an integer or None, but got 0.5"),
    (lambda: untyped.nn.LayerNorm(8)(None), TypeError, "[layer_norm] input: expected a torch.Tensor, but got NoneType"),
    (lambda: untyped.nn.RMSNorm(8)([1.0]), TypeError, "[rms_norm] input: expected a torch.Tensor, but got list"),
    (
        lambda: untyped.nn.MultiheadAttention(8, 2)(Q[0], Q[0], Q[0], need_weights=False, attn_mask="x"),
        TypeError,
        "is_floating_point(): argument 'input' (position 1) must be Tensor, not str",  # torch's own
    ),
    (
        lambda: untyped.optim.AdamW([torch.nn.Parameter(Q)], max_grad_norm="x"),
        TypeError,
        "[AdamW] max_grad_norm: expected a number above 0, or None, but got 'x'",
    ),
    (
        lambda: untyped.optim.SGD([{"params": [torch.nn.Parameter(Q)], "zero_grads": 0.5}]),
        TypeError,
        "[SGD] zero_grads: expected a bool, but got 0.5",
    ),
    (
        lambda: untyped.patch(torch.nn.LayerNorm(8), norms="all"),
        TypeError,
        "[patch] norms: expected a bool, but got 'all'",
    ),
    (lambda: untyped.ops.sgd_([Q], [Q], [], lr=1j), TypeError, "[sgd_] lr: expected a number or a torch.Tensor"),
    (
        lambda: untyped.ops.sgd_([torch.ones(2, requires_grad=True)], [torch.ones(2)], [], lr=1.0),
        RuntimeError,
        "[sgd_] params[0]: a leaf Variable that requires grad is being used in an in-place operation",
    ),
    (
        lambda: torch.ops.torchweld.layer_norm_forward(None, torch.ones(8), None, *Norm(8, 1e-5)),
        TypeError,
        "[layer_norm_forward] input: expected a torch.Tensor, but got None",
    ),
    (lambda: untyped.ops.add_rms_norm(Q, None, (8,)), TypeError, "[add_rms_norm] residual: expected a torch.Tensor"),
    (
        lambda: untyped.ops.layer_norm(Q, (8,), None, torch.ones(8, dtype=torch.int32)),
        TypeError,
        "[layer_norm] bias: expected a floating-point dtype, but got torch.int32",
    ),
    (
        lambda: untyped.ops.cross_entropy(torch.ones(5, 8, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)),
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


def test_a_strided_key_without_rows_is_served() -> None:
    q, key = x(1, 2, 5, 8), torch.ones(1, 2, 0, 16)[..., ::2]
    for out in (ops.attention(q, key, key), ops.scaled_dot_product_attention(q, key, key)):
        assert isinstance(out, Tensor) and not out.any()


def test_what_the_reference_says_of_another_class_names_op_and_argument() -> None:
    message = r"^\[add_layer_norm\] x: expected a tensor with memory of its own, but got a TwoTensor: "
    with pytest.raises(ValueError, match=message) as caught:
        ops.add_layer_norm(TwoTensor(Q, Q), Q[..., :3], (8,))
    assert isinstance(caught.value.__cause__, RuntimeError)


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


OPS = [name for name in ops.__all__ if not name.endswith("_") and callable(getattr(ops, name))]


@pytest.mark.parametrize("kind", ["cpu", "reference"])
@pytest.mark.parametrize("name", OPS)
def test_none_is_no_tensor(name: str, kind: str) -> None:
    """Whatever argument is None that must not be: the error is one of the op's own."""
    op = getattr(ops, name)
    given = {"normalized_shape": (4,)}
    needed = [p.name for p in inspect.signature(op).parameters.values() if p.default is p.empty]
    for absent in needed:
        arguments = {n: None if n == absent else given.get(n, torch.ones(2, 4)) for n in needed}
        with torchweld.use_backend(kind), pytest.raises((TypeError, ValueError, RuntimeError), match=rf"^\[{name}\]"):
            op(**arguments)
