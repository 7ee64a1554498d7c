"""Checks of the arguments of attention, in this order: device, dtype, layout, shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from torchweld.ops._arguments import KERNEL_DTYPES, check_dense, check_float, integer, number, shown


def fail(op: str, name: str, expected: str, got: object, remedy: str = "") -> NoReturn:
    raise RuntimeError(f"[{op}] {name}: expected {expected}, but got {got}{remedy and '; ' + remedy}")


def check_common(op: str, query: Tensor, key: Tensor, value: Tensor, names: str = "key, value") -> None:
    device, dtype = query.device, query.dtype
    if key.device != device or value.device != device:
        fail(op, names, f"device {device} as query", f"{key.device} and {value.device}", "move them with .to()")
    if dtype not in KERNEL_DTYPES:
        check_float(op, "query", dtype)
    if key.dtype is not dtype or value.dtype is not dtype:
        fail(op, names, f"query's dtype {dtype}", f"{key.dtype} and {value.dtype}", "convert them with .to()")


def check_heads(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    (batch, heads, _, size), (key_batch, kv_heads, keys, key_size) = query.shape, key.shape
    if key_batch != batch or value.shape[0] != batch:
        fail(op, "key, value", f"query's batch of {batch}", f"{key_batch} and {value.shape[0]}")
    if key_size != size:
        fail(op, "key", f"query's head size {size}", key_size)
    if value.shape[1] != kv_heads or value.shape[2] != keys:
        fail(op, "value", f"key's {kv_heads} heads and {keys} rows", list(value.shape))
    if kv_heads != heads and (kv_heads == 0 or heads % kv_heads != 0):
        fail(op, "key", f"a number of heads that divides query's {heads}", kv_heads)


def check_softcap(op: str, softcap: float | None) -> float:
    """0 for None."""
    if softcap is None:
        return 0.0
    if type(softcap) is not float:
        softcap = number(op, "softcap", softcap, "a number or None")
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"[{op}] softcap: expected 0 (none) or a positive number, but got {softcap}")
    return softcap


def check_dropout(op: str, dropout_p: float) -> float:
    if type(dropout_p) is not float:
        dropout_p = number(op, "dropout_p", dropout_p)
    if not 0.0 <= dropout_p <= 1.0:
        fail(op, "dropout_p", "a probability between 0 and 1", dropout_p)
    return dropout_p


def check_band(op: str, causal: bool, window: tuple[int | None, int | None] | None) -> tuple[int, int]:
    """How many keys a query sees to the left and to the right of its own position; -1: all of them."""
    left = right = -1
    if window is not None:
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            raise ValueError(_window(op, window))
        left, right = (-1 if w is None else integer(op, "window", w, "integers or None") for w in window)
        if (left < 0 and window[0] is not None) or (right < 0 and window[1] is not None):
            raise ValueError(_window(op, window))
    return left, 0 if causal else right


def _window(op: str, window: object) -> str:
    expected = "(left, right), each None or at least 0"
    return f"[{op}] window: expected {expected}, but got {shown(window)}; None stands for no bound"


def check_by_head(op: str, query: Tensor, batch: int, alibi_slopes: Tensor | None, sinks: Tensor | None) -> None:
    heads = query.shape[1]
    for name, modifier, shapes in (
        ("alibi_slopes", alibi_slopes, ((heads,), (batch, heads))),
        ("sinks", sinks, ((heads,),)),
    ):
        if modifier is not None:
            check_device(op, name, modifier, query)
            if tuple(modifier.shape) not in shapes:
                fail(op, name, " or ".join(str(list(s)) for s in shapes), list(modifier.shape))


def check_device(op: str, name: str, t: Tensor, query: Tensor) -> None:
    check_dense(op, **{name: t})
    if t.device != query.device:
        fail(op, name, f"device {query.device} as query", t.device, "move it with .to()")


def check_bias(op: str, name: str, bias: Tensor, query: Tensor, target: Sequence[int]) -> None:
    check_device(op, name, bias, query)
    dtype = bias.dtype
    if dtype is not torch.bool and dtype is not query.dtype and dtype is not torch.float32:
        fail(op, name, f"dtype bool, float32 or query's {query.dtype}", dtype, "convert it with .to()")
    shape = bias.shape
    if len(shape) > len(target) or any(
        n not in (1, t) for n, t in zip(reversed(shape), reversed(target), strict=False)
    ):
        fail(op, name, f"a shape that broadcasts to {list(target)}", list(shape))


def check_sequences(op: str, query: Tensor, lens_q: Tensor | None, lens_k: Tensor | None) -> int:
    """The number of packed sequences. The CPU kernels check the values of the tensors."""
    for name, lens in (("cu_seqlens_q", lens_q), ("cu_seqlens_k", lens_k)):
        if lens is None:
            fail(op, name, "both of cu_seqlens_q and cu_seqlens_k", "None")
        check_device(op, name, lens, query)
        if lens.dim() != 1 or lens.dtype is not torch.int32 or lens.numel() < 1:
            fail(op, name, "int32 of shape [batch + 1]", f"{lens.dtype} of shape {list(lens.shape)}", "use .int()")
    assert lens_q is not None and lens_k is not None
    if lens_q.numel() != lens_k.numel():
        fail(op, "cu_seqlens_k", f"{lens_q.numel()} elements as cu_seqlens_q", lens_k.numel())
    return lens_q.numel() - 1
