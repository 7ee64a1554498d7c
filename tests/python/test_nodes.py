"""Nodes of autograd in C++: forward and backward in one crossing each, with the bits of the registered ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchweld import _cpu, ops
from torchweld.ops._attention import Options
from torchweld.ops._attention_autograd import Numbers
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


def functions() -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Every op with a node, and leaves of a small call."""
    target = torch.tensor([1, 0, 7, 3])
    return {
        "gelu": (ops.gelu, (leaf(4, 8),)),
        "layer_norm": (lambda x, w, b: ops.layer_norm(x, (8,), w, b), (leaf(4, 8), leaf(8), leaf(8))),
        "rms_norm": (lambda x, w: ops.rms_norm(x, (8,), w), (leaf(4, 8), leaf(8))),
        "cross_entropy": (lambda x: ops.cross_entropy(x, target), (leaf(4, 8),)),
        "attention": (ops.scaled_dot_product_attention, (leaf(1, 2, 4, 8), leaf(1, 2, 5, 8), leaf(1, 2, 5, 8))),
    }


@pytest.mark.parametrize("name", functions())
def test_what_is_differentiated_again_or_batched_takes_the_definition(name: str) -> None:
    function, leaves = functions()[name]
    gradients = torch.autograd.grad(function(*leaves).pow(2).sum(), leaves, create_graph=True)
    assert all(g.requires_grad for g in gradients)
    for g in torch.autograd.grad([g.sum() for g in gradients], leaves):
        assert g.isfinite().all()
    output = function(*leaves)
    doutputs = torch.randn(3, *output.shape)
    batched = torch.autograd.grad(output, leaves, doutputs, is_grads_batched=True, retain_graph=True)
    for i, doutput in enumerate(doutputs):
        for rows, row in zip(batched, torch.autograd.grad(output, leaves, doutput, retain_graph=True), strict=True):
            torch.testing.assert_close(rows[i], row, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", functions())
def test_a_backward_that_is_watched_or_gets_other_tensors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the same saved tensors, read once: those of a checkpoint can be read only once."""
    function, leaves = functions()[name]
    doutput = torch.randn_like(function(*leaves).detach())
    expected = step(function, leaves, doutput)[1:]

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, leaves, doutput)

    output = function(*leaves)
    with counted(monkeypatch) as called, Watched():
        found = backward()
    assert len(called) == 1
    torch.testing.assert_close(list(found), expected, rtol=0, atol=0)

    def strided(t: Tensor) -> Tensor:
        """The values of `t` in another layout, where it has one."""
        return t.mT.contiguous().mT if t.dim() > 1 else t

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, strided):
        output = function(*leaves)
    torch.testing.assert_close(list(backward()), expected, rtol=1e-5, atol=1e-6)
    output = torch.utils.checkpoint.checkpoint(lambda *xs: function(*map(strided, xs)), *leaves, use_reentrant=False)
    torch.testing.assert_close(list(backward()), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match=r"backward through the graph a second time|already been freed"):
        output = function(*leaves)
        backward()
        backward()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", functions())
def test_hooks_anomaly_mode_and_direct_calls_of_a_node(name: str) -> None:
    function, leaves = functions()[name]
    output = function(*leaves)
    node: Any = output.grad_fn
    assert node.name() == f"_{'LayerNorm' if 'norm' in name else _camel(name)}Backward"
    seen: list[str] = []
    node.register_prehook(lambda doutputs: seen.append("before"))
    node.register_hook(lambda dinputs, doutputs: seen.append("after"))
    doutput = torch.randn_like(output)
    with torch.autograd.detect_anomaly(check_nan=True):
        found = torch.autograd.grad(output, leaves, doutput, retain_graph=True)
    assert seen == ["before", "after"]
    with torch.no_grad():
        direct = [g for g in node.apply(doutput) if g is not None]
    torch.testing.assert_close(direct[: len(found)], list(found), rtol=0, atol=0)


def _camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


class Definition:
    """A definition that says what it was asked for."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Any, ...]:
        return "forward", *args

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Any, ...], *doutputs: Any) -> tuple[Any, ...]:
        return "gradients", saved, *doutputs


def context(*saved: Any, **attributes: Any) -> SimpleNamespace:
    def save_for_backward(*tensors: Any) -> None:
        raise AssertionError("a call that is not common saves nothing")

    attributes = {"needs_input_grad": (True,) * 6, **attributes}
    return SimpleNamespace(
        definition=Definition, saved_tensors=saved, save_for_backward=save_for_backward, **attributes
    )


@torch.no_grad()
def test_what_is_not_common_is_left_to_the_definition() -> None:
    x, other, weight = torch.randn(4, 8), torch.randn(4, 8), torch.randn(8)
    norm, stats = norm_of(8, 1e-5), torch.ones(2, 4)
    target, q = torch.zeros(4, dtype=torch.int64), torch.randn(1, 2, 4, 8)
    loss: dict[str, Any] = {"ignore_index": -100, "smoothing": 0.0, "reduction": "mean", "rows": 4}
    numbers = Numbers(Options(1.0), deterministic=True, return_lse=False)
    freed = torch.randn(4, 8)
    freed.untyped_storage().resize_(0)

    def forward(node: Callable[..., Any], *args: Any) -> None:
        found = node(context(), *args)
        assert found[0] == "forward" and all(a is b for a, b in zip(found[1:], args, strict=True))

    def gradients(node: Callable[..., Any], doutput: Any, *saved: Any, **attributes: Any) -> None:
        found = node(context(*saved, **attributes), doutput)
        assert found[0] == "gradients" and found[2] is doutput
        assert all(a is b for a, b in zip(found[1], saved, strict=True))

    for odd in (None, 3.0, x.double(), x.t(), x[:, ::2], freed, torch.empty(4, 8, device="meta"), x.to_sparse()):
        forward(_cpu.node_gelu_forward, odd, True)
        gradients(_cpu.node_gelu_backward, odd, x, exact=True)
        gradients(_cpu.node_gelu_backward, x, odd, exact=True)
        forward(_cpu.node_layer_norm_forward, odd, weight, None, norm)
        gradients(_cpu.node_layer_norm_backward, odd, x, weight, None, stats, norm=norm)
        gradients(_cpu.node_layer_norm_backward, other, odd, weight, None, stats, norm=norm)
        if odd is not None:
            forward(_cpu.node_layer_norm_forward, x, odd, None, norm)
        forward(_cpu.node_cross_entropy_forward, odd, target, -100, 0.0, "mean", torch.float32)
        gradients(_cpu.node_cross_entropy_backward, odd, x, target, stats, None, **loss)
        gradients(_cpu.node_cross_entropy_backward, torch.ones(()), x.flatten(), target, stats, None, **loss)
        forward(_cpu.node_attention_forward, numbers, odd, q, q, None)
        gradients(_cpu.node_attention_backward, odd, q, stats, q, q, q, None, options=Options(1.0), deterministic=True)
    gradients(_cpu.node_gelu_backward, torch.randn(8, 4).t(), x, exact=True)
    gradients(_cpu.node_cross_entropy_backward, torch.ones(()), x, target, stats, None, **{**loss, "rows": None})
    forward(_cpu.node_attention_forward, numbers, q, q, q, torch.randn(3, 5))
    dropped = numbers._replace(options=Options(1.0, dropout_p=0.5))
    forward(_cpu.node_attention_forward, dropped, q, q, q, None)


@torch.no_grad()
def test_what_reaches_a_kernel_is_checked() -> None:
    x, weight, target = torch.randn(4, 8), torch.randn(8), torch.zeros(4, dtype=torch.int64)
    loss: dict[str, Any] = {"ignore_index": -100, "smoothing": 0.0, "reduction": "mean", "rows": 4}
    with pytest.raises(IndexError, match=r"^\[cross_entropy\] target: expected classes in \[0, 8\)"):
        _cpu.node_cross_entropy_forward(context(), x, target + 9, -100, 0.0, "mean", torch.float32)
    wrong = torch.ones(2, 3)  # statistics of another size
    with pytest.raises(ValueError, match=r"^\[layer_norm_backward\] stats: expected shape \[2, 4\], but got \[2, 3\]"):
        _cpu.node_layer_norm_backward(context(x, weight, None, wrong, norm=norm_of(8, 1e-5)), x)
    with pytest.raises(ValueError, match=r"^\[cross_entropy_backward\] stats"):
        _cpu.node_cross_entropy_backward(context(x, target, wrong, None, **loss), torch.ones(()))
    for node in (_cpu.node_gelu_backward, _cpu.node_layer_norm_backward, _cpu.node_attention_backward):
        with pytest.raises(TypeError, match=r"^saved_tensors: expected a tuple of \d"):
            node(context(), x)
    with pytest.raises(AttributeError):
        _cpu.node_gelu_backward(None, x)
