"""paged_attention: queries over a cache of keys and values in blocks, as servers of language models keep it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchweld import backend, reference
from torchweld.ops._arguments import check_dense, defined, flag, number
from torchweld.ops._attention import heads_like, operand, refusal
from torchweld.ops._attention_checks import (
    check_band,
    check_by_head,
    check_common,
    check_device,
    check_softcap,
    fail,
)
from torchweld.ops._register import elsewhere, register, settle, wants_grad


class PagedOptions(NamedTuple):
    """The numbers. -1 means: no bound of the band."""

    scale: float
    softcap: float
    left: int
    right: int


# ---- Implementation


def _lse_like(query: Tensor) -> Tensor:
    return query.new_empty(query.shape[:3], dtype=torch.float32)


def _run(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    options: PagedOptions,
) -> tuple[Tensor, Tensor]:
    q, k, v = operand(query, "query"), operand(key_cache, "key_cache"), operand(value_cache, "value_cache")
    table = settle(block_table, "[paged_attention] block_table")
    lengths = settle(cache_seqlens, "[paged_attention] cache_seqlens")
    output, lse = heads_like(query, value_cache.shape[-1]), _lse_like(query)
    if alibi_slopes is not None:
        alibi_slopes = settle(alibi_slopes, "[paged_attention] alibi_slopes", torch.float32).expand(query.shape[:2])
    if sinks is not None:
        sinks = settle(sinks, "[paged_attention] sinks", torch.float32)
    backend.kernels[q.device.type].paged_attention(
        query=q,
        key_cache=k,
        value_cache=v,
        block_table=table,
        cache_seqlens=lengths,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        options=options,
        output=output,
        lse=lse,
    )
    return output, lse


# ---- Fake


def _fake(query: Tensor, key_cache: Tensor, value_cache: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return heads_like(query, value_cache.shape[-1]), _lse_like(query)


# ---- Registration

_op = register(
    "paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor cache_seqlens, "
    "Tensor? alibi_slopes, Tensor? sinks, PagedOptions options) -> (Tensor output, Tensor lse)",
    _run,
    _fake,
    PagedOptions,
)

# ---- Public

_TENSORS = ("query", "key_cache", "value_cache", "block_table", "cache_seqlens", "alibi_slopes", "sinks")


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of a few new queries over a cache of keys and values in blocks. Each batch has its own length.

    Key j of batch b is row j % block_size of block block_table[b, j // block_size], for j < cache_seqlens[b]. The last
    query is at the position of the last key, as with `causal_align="bottom_right"`. A batch without keys gives zeros,
    and lse -inf. Rows past the last key are not read. The lengths stay on the device and the host does not wait for
    them, so a CUDA graph can be replayed while the cache grows. Inference only. For a cache without blocks, use one
    block per batch and the table arange(B)[:, None].
    Kwon et al.: PagedAttention, arXiv:2309.06180; Dao et al.: Flash-Decoding, 2023.

    Args:
        query: (B, Hq, Nq, D), float32, bfloat16 or float16 (others, and on a GPU head sizes above 256, run on the
            reference). Several queries (a draft to verify, a piece of a prompt) need `causal=True`. The kernels are
            made for few queries.
        key_cache: (blocks, block_size, Hkv, D), Hq a multiple of Hkv; any strides, the last of them 1.
        value_cache: (blocks, block_size, Hkv, Dv).
        block_table: int32 (B, the most blocks of a batch). Entries past a batch's last block are not read.
        cache_seqlens: int32 (B), the number of keys of each batch, with those of `query`. The CPU checks block_table
            and cache_seqlens. On a GPU wrong values give wrong rows, never a bad access.
        causal, window, softcap, alibi_slopes, sinks, scale, return_lse: as in `attention`.

    Returns:
        (B, Hq, Nq, Dv) of query's dtype, in memory (B, Nq, Hq, Dv) if query is so. With `return_lse` also lse,
        float32 (B, Hq, Nq).

    Raises:
        RuntimeError: a device, dtype or shape does not fit, or a gradient would be needed.
        TypeError: query is not floating point of 16 bits or more, or an argument is of another type.
        ValueError: window, softcap, or the values of block_table or cache_seqlens are not as above.
    """
    op = "paged_attention"
    tensors = (query, key_cache, value_cache, block_table, cache_seqlens, alibi_slopes, sinks)
    softcap, return_lse = check_softcap(op, softcap), flag(op, "return_lse", return_lse)
    left, right = check_band(op, flag(op, "causal", causal), window)
    scale = None if scale is None else number(op, "scale", scale, "a number or None")
    if theirs := elsewhere(paged_attention, None, _TENSORS, *tensors):
        return theirs(
            *tensors[:5], causal=causal, window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
            scale=scale, return_lse=return_lse,
        )  # fmt: skip
    check_dense(op, query=query, key_cache=key_cache, value_cache=value_cache)
    check_common(op, query, key_cache, value_cache, names="key_cache, value_cache")
    _check_cache(op, query, key_cache, value_cache, block_table, cache_seqlens)
    check_by_head(op, query, query.shape[0], alibi_slopes, sinks)
    if wants_grad(query, key_cache, value_cache, alibi_slopes, sinks):
        fail(
            op, "query, key_cache, value_cache", "tensors that need no gradient", "one that does",
            "it has none: use torch.no_grad(), or attention for training",
        )  # fmt: skip
    scale = 1.0 / math.sqrt(max(query.shape[-1], 1)) if scale is None else scale
    if backend.choose(op, query.device, refusal(query, value_cache)) == "reference":
        return defined(
            reference.paged_attention,
            op,
            dict(zip(_TENSORS, tensors, strict=True)),
            query,
            key_cache,
            value_cache,
            block_table,
            cache_seqlens,
            window=(None if left < 0 else left, None if right < 0 else right),
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            scale=scale,
            return_lse=return_lse,
        )
    options = PagedOptions(scale=scale, softcap=softcap, left=left, right=right)
    output, lse = _op(query, key_cache, value_cache, block_table, cache_seqlens, alibi_slopes, sinks, options)
    return (output, lse) if return_lse else output


def _check_cache(
    op: str, query: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor
) -> None:
    for name, t, layout in (
        ("query", query, "[batch, heads, rows, head size]"),
        ("key_cache", key_cache, "[blocks, block size, heads, head size]"),
        ("value_cache", value_cache, "[blocks, block size, heads, head size]"),
    ):
        if t.dim() != 4:
            fail(op, name, layout, f"shape {list(t.shape)}")
    batch = query.shape[0]
    for name, t, dims, shape in (
        ("block_table", block_table, 2, "[batch, blocks]"),
        ("cache_seqlens", cache_seqlens, 1, "[batch]"),
    ):
        check_device(op, name, t, query)
        if t.dtype is not torch.int32 or t.dim() != dims or t.shape[0] != batch:
            expected = f"int32 of shape {shape}, a batch of {batch} as query"
            fail(op, name, expected, f"{t.dtype} of shape {list(t.shape)}", "use .int()")
    heads, kv_heads = query.shape[1], key_cache.shape[2]
    if key_cache.shape[-1] != query.shape[-1]:
        fail(op, "key_cache", f"query's head size {query.shape[-1]}", key_cache.shape[-1])
    if value_cache.shape[:3] != key_cache.shape[:3]:
        fail(op, "value_cache", f"key_cache's {list(key_cache.shape[:3])}", list(value_cache.shape))
    if kv_heads == 0 or heads % kv_heads:
        fail(op, "key_cache", f"a number of heads that divides query's {heads}", kv_heads)
    if key_cache.shape[1] == 0:
        fail(op, "key_cache", "blocks of at least one row", list(key_cache.shape))
