"""Whole calls, in which a public function crosses into C++ once: the same results, and only where nothing watches."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import torchweld
from torchweld import _cpu, backend, ops
from torchweld._torch import lazily_negated, lazily_zero

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = ((1, 64), (7, 33), (2, 3, 5), (300, 257))


def slowly(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> Any:
    """The call by the way that checks every argument in Python."""
    with monkeypatch.context() as patched:
        for op in (ops.gelu, ops.layer_norm, ops.rms_norm, ops.cross_entropy, ops.scaled_dot_product_attention):
            patched.setitem(op.__globals__, "_whole", lambda **_: None)
        return call()


def same(found: Tensor, expected: Tensor) -> None:
    assert found.dtype is expected.dtype and found.shape == expected.shape and found.stride() == expected.stride()
    assert torch.equal(found, expected) or torch.equal(found.isnan(), expected.isnan())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ROWS)
def test_norms_and_gelu(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(shape).to(dtype), torch.randn(shape[-1:]).to(dtype), torch.randn(shape[-1:]).to(dtype)
    calls: list[Callable[[], Tensor]] = [lambda: ops.gelu(x), lambda: ops.gelu(x, "tanh")]
    for w, b in itertools.product((None, weight), (None, bias)):
        calls.append(lambda w=w, b=b: ops.layer_norm(x, shape[-1:], w, b, 1e-3))  # type: ignore[misc]
        calls.append(lambda w=w: ops.rms_norm(x, shape[-1:], w))  # type: ignore[misc]
        calls.append(lambda w=w: ops.rms_norm(x, shape[-1:], w, 1e-2))  # type: ignore[misc]
    for call in calls:
        same(call(), slowly(monkeypatch, call))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(monkeypatch: pytest.MonkeyPatch, reduction: str, dtype: torch.dtype) -> None:
    for rows, classes, smoothing in ((1, 1, 0.0), (8, 10, 0.0), (64, 2, 0.1), (37, 1001, 0.3)):
        logits, target = torch.randn(rows, classes).to(dtype), torch.randint(classes, (rows,))
        target[rows // 2] = -1
        options: dict[str, Any] = {"ignore_index": -1, "reduction": reduction, "label_smoothing": smoothing}
        found = ops.cross_entropy(logits, target, **options)
        expected = slowly(monkeypatch, partial(ops.cross_entropy, logits, target, **options))
        torch.testing.assert_close(found, expected, rtol=2e-7 if dtype is torch.float32 else 0, atol=0, equal_nan=True)
        with torch.autocast("cpu", torch.bfloat16):
            assert ops.cross_entropy(logits, target, **options).dtype is torch.float32
    with pytest.raises(IndexError, match=r"^\[cross_entropy\] target: expected classes in \[0, 3\)"):
        ops.cross_entropy(torch.randn(2, 3), torch.tensor([0, 3]))


MASKS = ((6, 9), (9,), (1, 1, 1, 9), (2, 1, 6, 9), (1, 4, 1, 1), (2, 4, 6, 9))


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(2, 4, n, 16).to(dtype) for n in (6, 9, 9))
    options: list[dict[str, Any]] = [{}, {"is_causal": True}, {"scale": 0.3}]
    for shape in MASKS:
        options += [{"attn_mask": torch.rand(shape) > 0.4}, {"attn_mask": torch.randn(shape)}]
        options += [{"attn_mask": torch.randn(shape).to(dtype)}]
    grouped = (query, key[:, :2], value[:, :2])
    merged = (query.transpose(1, 2).contiguous().transpose(1, 2), key, value)
    narrow = (query, key, value[..., :8])
    for operands, option in itertools.product(((query, key, value), merged, narrow), options):
        call = partial(ops.scaled_dot_product_attention, *operands, **option)
        same(call(), slowly(monkeypatch, call))
    call = partial(ops.scaled_dot_product_attention, *grouped, enable_gqa=True)
    same(call(), slowly(monkeypatch, call))


def test_a_call_that_is_watched_goes_to_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.overrides import TorchFunctionMode  # noqa: PLC0415
    from torch.utils._python_dispatch import TorchDispatchMode  # noqa: PLC0415

    x = torch.randn(3, 8)
    assert isinstance(_cpu.whole_gelu(x, "none"), Tensor)
    assert _cpu.whole_gelu(x.clone().requires_grad_(), "none") is True
    with torch.no_grad():
        assert isinstance(_cpu.whole_gelu(x.clone().requires_grad_(), "none"), Tensor)

    class Function(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    def under(context: Any) -> Any:
        with context:
            return _cpu.whole_gelu(x, "none")

    assert under(Function()) is None and under(Dispatch()) is None
    assert under(torch.profiler.profile()) is None
    assert under(torch.autograd.forward_ad.dual_level()) is None
    assert under(torchweld.use_backend("reference")) is None
    assert isinstance(under(torchweld.use_backend("cpu")), Tensor)
    with monkeypatch.context() as patched:
        patched.setitem(backend.kernels, "cpu", ModuleType("other"))
        assert _cpu.whole_gelu(x, "none") is None
    torch.func.vmap(lambda row: _none(_cpu.whole_gelu(row, "none"), row))(x)


def _none(found: object, row: Tensor) -> Tensor:
    assert found is None
    return row


def test_what_is_not_common_is_left_to_python() -> None:
    x = torch.randn(4, 8)
    freed = torch.randn(4, 8)
    freed.untyped_storage().resize_(0)
    odd: list[Any] = [
        None, 3.0, "x", [x], x.double(), x.int(), x.t(), x[:, ::2], x.to_sparse(), torch.empty(4, 8, device="meta"),
        torch.zeros(0, 8), freed, lazily_zero(x), lazily_negated(x), x.as_subclass(type("Mine", (Tensor,), {})),
    ]  # fmt: skip
    for given in odd:
        assert _cpu.whole_gelu(given, "none") is None
        assert _cpu.whole_layer_norm(given, (8,), None, None, 1e-5) is None
        assert _cpu.whole_layer_norm(x, (8,), given, None, 1e-5) is None or given is None
        assert _cpu.whole_rms_norm(given, (8,), None, None) is None
        assert _cpu.whole_cross_entropy(given, torch.zeros(4, dtype=torch.int64), -100, "mean", 0.0) is None
        assert _cpu.whole_cross_entropy(x, given, -100, "mean", 0.0) is None
        for place in range(3):
            operands: list[Any] = [torch.randn(1, 2, 4, 8) for _ in range(3)]
            operands[place] = given
            query, key, value = operands
            assert _cpu.whole_attention(query, key, value, None, 0.0, False, None, False, None) is None
    for shape in ((9,), [8], 8, (8.0,), (2**70,), (-1,), (4, 8), ()):
        assert _cpu.whole_layer_norm(x, shape, None, None, 1e-5) is None
    for eps in (1, "1", None, x):
        assert _cpu.whole_layer_norm(x, (8,), None, None, eps) is None
    target = torch.zeros(4, dtype=torch.int64)
    for rest in ((2**70, "mean", 0.0), (-100, "max", 0.0), (-100, "mean", 2.0), (-100, "mean", 0), (0.5, "mean", 0.0)):
        assert _cpu.whole_cross_entropy(x, target, *rest) is None
