"""Whole calls of autograd nodes: forward and backward in one crossing each, with the bits of the registered ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchweld import _cpu, ops
from torchweld.ops._attention import PLAIN, Options, heads_like
from torchweld.ops._norm import norm_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Watched(TorchDispatchMode):
    """Every op goes through the dispatcher, and so past the whole calls."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The kernels that are called in the block through the bindings of one tensor at a time."""
    called: list[str] = []
    names = ("gelu", "layer_norm", "cross_entropy", "attention")
    with monkeypatch.context() as patched:
        for name in (f"{n}_{direction}" for n in names for direction in ("forward", "backward")):
            kernel = getattr(_cpu, name)

            def call(*args: Any, kernel: Any = kernel, name: str = name, **kwargs: Any) -> Any:
                called.append(name)
                return kernel(*args, **kwargs)

            patched.setattr(_cpu, name, call)
        yield called


def step(function: Callable[..., Tensor], leaves: tuple[Tensor, ...], doutput: Tensor | None = None) -> list[Tensor]:
    """The output, and the gradients of those leaves that want one."""
    output = function(*leaves)
    wanted = [t for t in leaves if t.requires_grad]
    doutput = torch.ones_like(output) if doutput is None else doutput
    return [output.detach(), *torch.autograd.grad(output, wanted, doutput)]


def check(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Tensor], *leaves: Tensor) -> None:
    """A step in whole calls gives the same bits, layouts and dtypes as one through the dispatcher."""
    doutput = torch.randn_like(function(*leaves).detach())
    with counted(monkeypatch) as called:
        found = step(function, leaves, doutput)
    assert not called
    with Watched():
        expected = step(function, leaves, doutput)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype is theirs.dtype and ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_and_gelu(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    for shape in ((1, 64), (7, 33), (2, 3, 5), (300, 257)):
        x, weight, bias = leaf(*shape, dtype=dtype), leaf(shape[-1], dtype=dtype), leaf(shape[-1], dtype=dtype)
        size = shape[-1:]
        for approximate in ("none", "tanh"):
            check(monkeypatch, partial(ops.gelu, approximate=approximate), x)
        check(monkeypatch, lambda x, w, b, size=size: ops.layer_norm(x, size, w, b), x, weight, bias)
        check(monkeypatch, lambda x, w, size=size: ops.layer_norm(x, size, w), x, weight)
        check(monkeypatch, lambda x, b, size=size: ops.layer_norm(x, size, None, b), x.detach(), bias)
        check(monkeypatch, lambda x, size=size: ops.layer_norm(x, size), x)
        check(monkeypatch, lambda x, w, size=size: ops.rms_norm(x, size, w), x, weight)
        check(monkeypatch, lambda x, w, size=size: ops.rms_norm(x, size, w), x.detach(), weight)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy(monkeypatch: pytest.MonkeyPatch, reduction: str, dtype: torch.dtype) -> None:
    for rows, classes, smoothing in ((1, 1, 0.0), (8, 10, 0.0), (64, 2, 0.1), (37, 1001, 0.3)):
        target = torch.randint(classes, (rows,))
        target[: rows // 2] = -1
        options: dict[str, Any] = {"ignore_index": -1, "reduction": reduction, "label_smoothing": smoothing}
        check(
            monkeypatch, lambda x, t=target, o=options: ops.cross_entropy(x, t, **o), leaf(rows, classes, dtype=dtype)
        )


def test_a_loss_without_rows_that_count_is_torchs() -> None:
    logits, target = leaf(3, 5), torch.full((3,), -100)
    for reduction in ("mean", "sum"):
        ours, theirs = (
            step(partial(f, target=target, reduction=reduction), (logits,))
            for f in (ops.cross_entropy, torch.nn.functional.cross_entropy)
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    sdpa = ops.scaled_dot_product_attention
    merged = leaf(2, 6, 4, 16, dtype=dtype)
    q, k, v = leaf(2, 4, 6, 16, dtype=dtype), leaf(2, 4, 9, 16, dtype=dtype), leaf(2, 4, 9, 8, dtype=dtype)
    check(monkeypatch, sdpa, q, k, v)
    check(monkeypatch, partial(sdpa, is_causal=True), q, k, v)
    check(monkeypatch, sdpa, q.detach(), k, v)
    check(monkeypatch, lambda x, k, v: sdpa(x.transpose(1, 2), k, v), merged, k, v)
    check(monkeypatch, partial(sdpa, enable_gqa=True), q, leaf(2, 2, 9, 16, dtype=dtype), leaf(2, 2, 9, 8, dtype=dtype))
    for mask in (torch.rand(6, 9) > 0.4, torch.rand(2, 1, 1, 9) > 0.4, torch.randn(2, 4, 6, 9).to(dtype)):
        check(monkeypatch, partial(sdpa, attn_mask=mask), q, k, v)
    banded: Any = partial(ops.attention, causal=True, window=(2, 0), softcap=3.0)
    check(monkeypatch, banded, q, k, v)
    with_lse = ops.attention(q, k, v, return_lse=True)
    assert isinstance(with_lse, tuple)
    torch.autograd.grad(with_lse[0].sum() + with_lse[1].sum(), (q, k, v))


def test_second_derivatives_and_batched_gradients_take_the_definition() -> None:
    x, weight = leaf(4, 8), leaf(8)
    for function in (
        ops.gelu,
        lambda x: ops.layer_norm(x, (8,), weight),
        lambda x: ops.cross_entropy(x, torch.arange(4)).expand(4, 8),
    ):
        (gradient,) = torch.autograd.grad(function(x).pow(2).sum(), x, create_graph=True)
        assert gradient.requires_grad and torch.autograd.grad(gradient.sum(), x)[0].isfinite().all()
    rows = torch.autograd.grad(ops.gelu(x), x, torch.randn(3, 4, 8), is_grads_batched=True)[0]
    assert rows.shape == (3, 4, 8)


def test_what_is_not_common_is_left_to_the_registered_op() -> None:
    x, other, weight = torch.randn(4, 8), torch.randn(4, 8), torch.randn(8)
    norm, stats = norm_of(8, 1e-5), torch.ones(2, 4)
    target, q = torch.zeros(4, dtype=torch.int64), torch.randn(1, 2, 4, 8)
    every = (True, False, True, True)
    freed = torch.randn(4, 8)
    freed.untyped_storage().resize_(0)
    for odd in (None, 3.0, x.double(), x.t(), x[:, ::2], freed, torch.empty(4, 8, device="meta"), x.to_sparse()):
        assert _cpu.whole_gelu_forward(odd, True) is None
        assert _cpu.whole_gelu_backward(odd, x, True) is None and _cpu.whole_gelu_backward(x, odd, True) is None
        assert _cpu.whole_layer_norm_forward(odd, weight, None, norm) is None
        assert odd is None or _cpu.whole_layer_norm_forward(x, odd, None, norm) is None
        assert _cpu.whole_layer_norm_backward(odd, None, x, weight, None, stats, None, every, norm) is None
        assert _cpu.whole_layer_norm_backward(other, None, odd, weight, None, stats, None, every, norm) is None
        assert _cpu.whole_cross_entropy_forward(odd, target, -100, "mean", 0.0) is None
        assert _cpu.whole_cross_entropy_backward(odd, x, target, -100, 0.0, stats, 1) is None
        assert _cpu.whole_attention_forward(odd, q, q, PLAIN, Options(1.0), 2, heads_like) is None
    assert _cpu.whole_layer_norm_backward(other, x, x, weight, None, stats, None, every, norm) is None
    assert _cpu.whole_gelu_backward(torch.randn(8, 4).t(), x, True) is None
    for modifiers in (PLAIN._replace(sinks=weight), PLAIN._replace(bias=torch.randn(3, 5)), (), [None] * 6):
        assert _cpu.whole_attention_forward(q, q, q, modifiers, Options(1.0), 2, heads_like) is None
    assert _cpu.whole_attention_forward(q, q, q, PLAIN, Options(1.0, dropout_p=0.5), 2, heads_like) is None
    with pytest.raises(IndexError, match=r"^\[cross_entropy\] target: expected classes in \[0, 8\)"):
        _cpu.whole_cross_entropy_forward(x, target + 9, -100, "mean", 0.0)
    # A statistic of another size never reaches a kernel.
    with pytest.raises(ValueError, match=r"^\[layer_norm_backward\] stats: expected shape \[2, 4\], but got \[2, 3\]"):
        _cpu.whole_layer_norm_backward(other, None, x, weight, None, torch.ones(2, 3), None, every, norm)
    with pytest.raises(ValueError, match=r"^\[cross_entropy_backward\] stats"):
        _cpu.whole_cross_entropy_backward(torch.ones(()), x, target, -100, 0.0, torch.ones(2, 3), 1)
