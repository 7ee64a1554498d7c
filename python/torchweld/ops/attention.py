"""attention and scaled_dot_product_attention: the public functions, their checks, and what is native to the kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from torchweld import backend, reference
from torchweld.ops.attention_op import ALIGNMENTS, attention_with_grad, forward_op, inference_op, on_reference
from torchweld.ops.library import check_dense, wants_grad

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


def _fail(op: str, name: str, expected: str, got: object, remedy: str = "") -> NoReturn:
    raise RuntimeError(f"[{op}] {name}: expected {expected}, but got {got}{remedy and '; ' + remedy}")


def _check_common(op: str, query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> None:
    device, dtype = query.device, query.dtype
    if key.device != device or value.device != device:
        _fail(op, "key, value", f"device {device} as query", f"{key.device} and {value.device}", "move them with .to()")
    if not dtype.is_floating_point:
        raise TypeError(f"[{op}] query: expected a floating-point dtype, but got {dtype}")
    if key.dtype is not dtype or value.dtype is not dtype:
        _fail(op, "key, value", f"query's dtype {dtype}", f"{key.dtype} and {value.dtype}", "convert them with .to()")
    if not 0.0 <= dropout_p <= 1.0:
        _fail(op, "dropout_p", "a probability between 0 and 1", dropout_p)


def _check_heads(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    (batch, heads, _, size), (key_batch, kv_heads, keys, key_size) = query.shape, key.shape
    if key_batch != batch or value.shape[0] != batch:
        _fail(op, "key, value", f"query's batch of {batch}", f"{key_batch} and {value.shape[0]}")
    if key_size != size:
        _fail(op, "key", f"query's head size {size}", key_size)
    if value.shape[1] != kv_heads or value.shape[2] != keys:
        _fail(op, "value", f"key's {kv_heads} heads and {keys} rows", list(value.shape))
    if kv_heads != heads and (kv_heads == 0 or heads % kv_heads != 0):
        _fail(op, "key", f"a number of heads that divides query's {heads}", kv_heads)


def _check_bias(op: str, name: str, bias: Tensor, query: Tensor, target: Sequence[int]) -> None:
    if bias.device != query.device:
        _fail(op, name, f"device {query.device} as query", bias.device, "move it with .to()")
    dtype = bias.dtype
    if dtype is not torch.bool and dtype is not query.dtype and dtype is not torch.float32:
        _fail(op, name, f"dtype bool, float32 or query's {query.dtype}", dtype, "convert it with .to()")
    shape = bias.shape
    if len(shape) > len(target) or any(
        n not in (1, t) for n, t in zip(reversed(shape), reversed(target), strict=False)
    ):
        _fail(op, name, f"a shape that broadcasts to {list(target)}", list(shape))


def _refusal(query: Tensor, key: Tensor, value: Tensor, alibi_slopes: Tensor | None, dropout_p: float) -> str | None:
    """Why the kernels do not take these arguments, None if they do."""
    if query.device.type == "cuda":
        return "there are no CUDA kernels for attention"
    if query.dtype not in _DTYPES:
        return f"query of dtype {query.dtype}"
    if dropout_p > 0:
        return "dropout"
    if alibi_slopes is not None and wants_grad(alibi_slopes):
        return "a gradient for alibi_slopes"
    if query.numel() == 0 or key.numel() == 0 or value.numel() == 0:
        return "a tensor without elements"
    return None


def _attend(
    op: str,
    return_lse: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float,
    *scores: Any,
) -> Any:
    """output or (output, lse) of checked 4-dimensional arguments, by whichever backend serves them."""
    refusal = _refusal(query, key, value, alibi_slopes, dropout_p)
    if backend.choose(op, query.device, refusal) == "reference":
        both = on_reference(query, key, value, bias, alibi_slopes, sinks, dropout_p, *scores)
    elif wants_grad(query, key, value, bias, sinks):
        both = attention_with_grad(query, key, value, bias, alibi_slopes, sinks, *scores)
    elif return_lse:
        both = forward_op(query, key, value, bias, alibi_slopes, sinks, *scores)
    else:
        return inference_op(query, key, value, bias, alibi_slopes, sinks, *scores)
    return both if return_lse else both[0]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    causal_align: str = "top_left",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scores) @ value with tiled online softmax: O(N) memory, forward and backward.

    scores = query @ key^T * scale; softcap * tanh(scores / softcap); + bias; - slope * |i + shift - j|; and -inf where
    query i does not see key j. shift is 0 for `causal_align="top_left"` (torch's), Nk - Nq for "bottom_right" (a KV
    cache's). A row that sees nothing gives zeros, with zero gradients. Statistics and gradients accumulate in float32.
    Keys outside the band of `causal` and `window` are not read; one beside its edge, and one that only `bias` hides, is
    multiplied by a weight of zero, so a NaN there can reach rows of the same tile (as it does in torch).
    Dao et al.: FlashAttention, arXiv:2205.14135 and 2307.08691; Milakov, Gimelshein: arXiv:1805.02867.

    Args:
        query: (B, Hq, Nq, D), float32, bfloat16 or float16 (others run on the reference). Packed: (total_q, Hq, D).
        key: (B, Hkv, Nk, D), Hq a multiple of Hkv. Packed: (total_k, Hkv, D).
        value: (B, Hkv, Nk, Dv). Packed: (total_k, Hkv, Dv).
        causal: query i sees keys up to i + shift.
        window: (left, right): it sees keys from i + shift - left to i + shift + right; None: no bound on that side.
        softcap: bounds the scores to (-softcap, softcap); 0: no cap.
        bias: broadcasts to (B, Hq, Nq, Nk): boolean (True attends), or additive (query's dtype or float32) with a
            gradient.
        alibi_slopes: (Hq) or (B, Hq) (arXiv:2108.12409).
        sinks: (Hq), exp(sink) is added to the softmax's denominator (arXiv:2309.17453); has a gradient.
        dropout_p: probability that a weight is dropped (runs on the reference).
        scale: 1 / sqrt(D) if None.
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1), where each packed sequence starts; both or none (reference).
        causal_align: "top_left" or "bottom_right".
        return_lse: also return the log of the softmax's denominator.

    Returns:
        (B, Hq, Nq, Dv) of query's dtype, in memory (B, Nq, Hq, Dv) if query is so; packed (total_q, Hq, Dv). With
        `return_lse` also lse, float32 (B, Hq, Nq), packed (Hq, total_q), which has a gradient.

    Raises:
        RuntimeError: a device, dtype or shape does not fit, or dropout_p is out of range.
        TypeError: query is not floating point.
        ValueError: window, softcap or causal_align is not as above.
    """
    op = "attention"
    check_dense(op, query=query, key=key, value=value)
    if causal_align not in ALIGNMENTS:
        raise ValueError(f"[{op}] causal_align: expected 'top_left' or 'bottom_right', but got {causal_align!r}")
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"[{op}] softcap: expected 0 (none) or a positive number, but got {softcap}")
    left = right = -1
    if window is not None:
        if len(window) != 2 or any(w is not None and w < 0 for w in window):
            raise ValueError(
                f"[{op}] window: expected (left, right), each None or at least 0, but got {window}; "
                f"None stands for no bound"
            )
        left, right = (-1 if w is None else w for w in window)
    if causal:
        right = 0
    _check_common(op, query, key, value, dropout_p)
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() != (3 if packed else 4):
            shape = "(total, heads, head size)" if packed else "(batch, heads, rows, head size)"
            _fail(op, name, shape, f"shape {list(t.shape)}")
    heads = query.shape[1]
    for name, modifier in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if modifier is None:
            continue
        if modifier.device != query.device:
            _fail(op, name, f"device {query.device} as query", modifier.device, "move it with .to()")
        batched = () if packed or name == "sinks" else ((query.shape[0], heads),)
        if packed and name == "alibi_slopes" and cu_seqlens_q is not None:
            batched = ((cu_seqlens_q.numel() - 1, heads),)
        if tuple(modifier.shape) not in ((heads,), *batched):
            _fail(op, name, f"shape [{heads}]" + (" or [batch, heads]" if batched else ""), list(modifier.shape))
    scale = 1.0 / math.sqrt(max(query.shape[-1], 1)) if scale is None else scale

    if packed:
        for name, lens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            if lens is None:
                _fail(op, name, "both of cu_seqlens_q and cu_seqlens_k", "None")
            if lens.dim() != 1 or lens.dtype is not torch.int32 or lens.numel() < 1:
                _fail(op, name, "int32 of shape [batch + 1]", f"{lens.dtype} of shape {list(lens.shape)}")
        if bias is not None:
            _fail(op, "bias", "None beside cu_seqlens_q", "a tensor")
        _check_heads(op, *(t.transpose(0, 1).unsqueeze(0) for t in (query, key, value)))
        backend.choose(op, query.device, "packed sequences (cu_seqlens_q)")
        return reference.attention(
            query,
            key,
            value,
            causal=causal,
            window=window,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            dropout_p=dropout_p,
            scale=scale,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            causal_align=causal_align,
            return_lse=return_lse,
        )
    _check_heads(op, query, key, value)
    if bias is not None:
        _check_bias(op, "bias", bias, query, (*query.shape[:3], key.shape[2]))
    return _attend(
        op,
        return_lse,
        query,
        key,
        value,
        bias,
        alibi_slopes,
        sinks,
        dropout_p,
        scale,
        softcap,
        left,
        right,
        causal_align == "bottom_right",
    )


def _fold(
    op: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[int, ...]]:
    """(B, H, N, D) of torch's (..., N, D), whose batch dimensions broadcast; and the output's batch dimensions."""
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() < 2 + enable_gqa:
            _fail(op, name, f"at least {2 + enable_gqa} dimensions", f"shape {list(t.shape)}")
    # With grouped queries the heads are no batch dimension: each tensor keeps its own number of them.
    tails = [t.shape[-3:] if enable_gqa else t.shape[-2:] for t in (query, key, value)]
    leads = [t.shape[: t.dim() - len(tail)] for t, tail in zip((query, key, value), tails, strict=True)]
    try:
        batch = tuple(torch.broadcast_shapes(*leads))
    except RuntimeError:
        _fail(op, "key, value", f"batch dimensions that broadcast with query's {list(leads[0])}", leads[1:])
    if enable_gqa:
        heads = query.shape[-3]
        if 0 in (key.shape[-3], value.shape[-3]) or heads % key.shape[-3] or heads % value.shape[-3]:
            _fail(op, "key, value", f"numbers of heads that divide query's {heads}", (key.shape[-3], value.shape[-3]))
        if key.shape[-3] != value.shape[-3]:
            key, value = (t.repeat_interleave(heads // t.shape[-3], dim=-3) for t in (key, value))
            tails = [t.shape[-3:] for t in (query, key, value)]
        outer, batch = batch, (*batch, heads)
    else:
        outer = batch[:-1]
    query, key, value = (
        t.expand(*(outer if enable_gqa else batch), *tail).reshape(
            math.prod(outer), *(tail if enable_gqa else (math.prod(batch[-1:]), *tail))
        )
        for t, tail in zip((query, key, value), tails, strict=True)
    )
    if mask is not None:
        rows = (query.shape[-2], key.shape[-2])
        _check_bias(op, "attn_mask", mask, query, (*batch, *rows))
        if mask.dim() > 2 and len(batch) != 2:
            mask = mask.expand(*batch, *rows).reshape(math.prod(outer), -1, *rows)
    return query, key, value, mask, batch


def _autocast(t: Tensor) -> Tensor:
    if not t.dtype.is_floating_point or t.dtype is torch.float64:
        return t
    return t.to(torch.get_autocast_dtype(t.device.type))


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Drop-in for `torch.nn.functional.scaled_dot_product_attention`, on the kernels of `attention`.

    Args:
        query: (..., H, L, E), float32, bfloat16 or float16 (others run on the reference).
        key, value: (..., H, S, E) and (..., H, S, Ev); batch dimensions broadcast.
        attn_mask: broadcasts to (..., H, L, S): boolean (True attends), or additive (query's dtype or float32) with
            a gradient.
        dropout_p: probability that a weight is dropped, always applied (runs on the reference).
        is_causal: query i sees keys 0 to i; not together with attn_mask.
        scale: 1 / sqrt(E) if None.
        enable_gqa: query's heads are a multiple of key's and value's, which are shared by groups of them.

    Returns:
        (..., H, L, Ev) of query's dtype, in memory (..., L, H, Ev) if query is so. Zeros in rows that see nothing.

    Raises:
        RuntimeError: a device, dtype or shape does not fit, both masks are given, or dropout_p is out of range.
        TypeError: query is not floating point.
    """
    op = "scaled_dot_product_attention"
    check_dense(op, query=query, key=key, value=value)
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = _autocast(query), _autocast(key), _autocast(value)
        attn_mask = None if attn_mask is None else _autocast(attn_mask)
    _check_common(op, query, key, value, dropout_p)
    if is_causal and attn_mask is not None:
        _fail(op, "attn_mask", "None beside is_causal=True", "a tensor", "put the causal mask into it, or drop one")
    if scale is None:
        scale = 1.0 / math.sqrt(max(query.shape[-1], 1))
    scores = (scale, 0.0, -1, 0 if is_causal else -1, False)

    # The common case: 4 dimensions, nothing to broadcast.
    shape, key_shape, value_shape = query.shape, key.shape, value.shape
    if (
        len(shape) == len(key_shape) == len(value_shape) == 4
        and shape[0] == key_shape[0] == value_shape[0]
        and key_shape[1] == value_shape[1]
        and (enable_gqa or shape[1] == key_shape[1])
    ):
        if not shape == key_shape == value_shape:
            _check_heads(op, query, key, value)
        if attn_mask is not None:
            _check_bias(op, "attn_mask", attn_mask, query, (*query.shape[:3], key.shape[2]))
        return _attend(op, False, query, key, value, attn_mask, None, None, dropout_p, *scores)
    q, k, v, mask, batch = _fold(op, query, key, value, attn_mask, enable_gqa)
    _check_heads(op, q, k, v)
    out: Tensor = _attend(op, False, q, k, v, mask, None, None, dropout_p, *scores)
    return out.reshape(*batch, query.shape[-2], value.shape[-1])
