"""scaled_dot_product_attention: torch's signature, on the kernels of attention."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from torchweld import backend
from torchweld.ops._arguments import NotDenseError, as_torch_does, check_dense, check_memory, flag, number, recordable
from torchweld.ops._attention import Modifiers, Options, heads_like
from torchweld.ops._attention_autograd import Numbers, attend, attention_node
from torchweld.ops._attention_checks import check_bias, check_common, check_dropout, check_heads, fail
from torchweld.ops._register import compiling, elsewhere, under_autocast
from torchweld.reference.philox import draw_seed

_twin = torch.nn.functional.scaled_dot_product_attention
_whole = backend.whole_call("attention")
_TENSORS = ("query", "key", "value", "attn_mask")


def _fold(
    op: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[int, ...]]:
    """torch's (..., N, D) as (B, H, N, D), with broadcast batch dimensions; and the batch dimensions of the output."""
    check_memory(op, query=query, key=key, value=value, attn_mask=mask)
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() < 2 + enable_gqa:
            fail(op, name, f"at least {2 + enable_gqa} dimensions", f"shape {list(t.shape)}")
    # With grouped queries the heads are not a batch dimension: each tensor keeps its number of heads.
    tails = [t.shape[-3:] if enable_gqa else t.shape[-2:] for t in (query, key, value)]
    leads = [t.shape[: t.dim() - len(tail)] for t, tail in zip((query, key, value), tails, strict=True)]
    try:
        batch = tuple(torch.broadcast_shapes(*leads))
    except RuntimeError:
        first, *others = map(list, leads)
        fail(op, "key, value", f"batch dimensions that broadcast with query's {first}", others)
    if enable_gqa:
        heads = query.shape[-3]
        if 0 in (key.shape[-3], value.shape[-3]) or heads % key.shape[-3] or heads % value.shape[-3]:
            fail(op, "key, value", f"numbers of heads that divide query's {heads}", (key.shape[-3], value.shape[-3]))
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
        check_bias(op, "attn_mask", mask, query, (*batch, *rows))
        if mask.dim() > 2 and len(batch) != 2:
            mask = mask.expand(*batch, *rows).reshape(math.prod(outer), math.prod(batch[len(outer) :]), *rows)
    return query, key, value, mask, batch


@lru_cache(maxsize=256)  # two records cost 2 us, and a model has few different ones
def _numbers(dim: int, scale: float | None, is_causal: bool) -> Numbers:
    options = Options(1.0 / math.sqrt(dim) if scale is None else scale, right=0 if is_causal else -1)
    return Numbers(options, deterministic=True, return_lse=False)


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
        dropout_p: probability that a weight is dropped. torch.manual_seed decides which weights are dropped; torch's
            own function would drop others.
        is_causal: query i sees keys 0 to i, of those that attn_mask leaves. (torch's kernel on the CPU takes both,
            torch's composite refuses them.)
        scale: 1 / sqrt(E) if None.
        enable_gqa: query has a multiple of key's and value's heads. A group of query heads shares each of these.

    Returns:
        (..., H, L, Ev) of query's dtype, in memory (..., L, H, Ev) if query is so. Zeros in rows that see nothing.

    Raises:
        RuntimeError: a device, dtype or shape does not fit, or dropout_p is out of range.
        TypeError: query is not floating point of 16 bits or more, or an argument is of another type.
    """
    op = "scaled_dot_product_attention"
    if not compiling():
        found = _whole(
            query=query, key=key, value=value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal,
            scale=scale, enable_gqa=enable_gqa, heads_like=heads_like,
        )  # fmt: skip
        if found is True:
            numbers = _numbers(query.size(-1), scale, is_causal)
            return attention_node(numbers, query, key, value, recordable(attn_mask))
        if found is not None:
            return found
    dropout_p, is_causal, enable_gqa = (
        check_dropout(op, dropout_p), flag(op, "is_causal", is_causal), flag(op, "enable_gqa", enable_gqa)
    )  # fmt: skip
    scale = None if scale is None else number(op, "scale", scale, "a number or None")
    if theirs := elsewhere(scaled_dot_product_attention, _twin, _TENSORS, query, key, value, attn_mask):
        return theirs(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    try:
        check_dense(op, query=query, key=key, value=value)
    except NotDenseError as error:
        rest = (attn_mask, dropout_p, is_causal)
        return as_torch_does(error, _twin, query, key, value, *rest, scale=scale, enable_gqa=enable_gqa)
    if under_autocast(query):
        check_memory(op, query=query, key=key, value=value, attn_mask=attn_mask)
        query, key, value = _autocast(query), _autocast(key), _autocast(value)
        attn_mask = None if attn_mask is None else _autocast(attn_mask)
    check_common(op, query, key, value)
    scale = 1.0 / math.sqrt(max(query.shape[-1], 1)) if scale is None else scale
    # No float by default: see norm_of in _norm.py.
    options = Options(scale, softcap=0.0, right=0 if is_causal else -1, dropout_p=dropout_p)
    seed = draw_seed(query.device) if dropout_p > 0 else None

    # The common case: 4 dimensions, nothing to broadcast.
    shape, key_shape, value_shape = query.shape, key.shape, value.shape
    if (
        len(shape) == len(key_shape) == len(value_shape) == 4
        and shape[0] == key_shape[0] == value_shape[0]
        and key_shape[1] == value_shape[1]
        and (enable_gqa or shape[1] == key_shape[1])
    ):
        if not shape == key_shape == value_shape:
            check_heads(op, query, key, value)
        if attn_mask is not None:
            check_bias(op, "attn_mask", attn_mask, query, (*query.shape[:3], key.shape[2]))
        return attend(op, False, query, key, value, Modifiers(bias=recordable(attn_mask), seed=seed), options)
    q, k, v, mask, batch = _fold(op, query, key, value, attn_mask, enable_gqa)
    check_heads(op, q, k, v)
    out: Tensor = attend(op, False, q, k, v, Modifiers(bias=recordable(mask), seed=seed), options)
    return out.reshape(*batch, query.shape[-2], value.shape[-1])
