"""Attention over a cache of keys and values in blocks (Kwon et al.: PagedAttention, arXiv:2309.06180)."""

from __future__ import annotations

import torch
from torch import Tensor

from torchweld.reference.attention import attention


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention`, aligned to the last key, of each batch over the first rows of the blocks in its table.

    Arguments, shapes and result are those of `torchweld.ops.paged_attention`.
    """
    (count, block_size), room = key_cache.shape[:2], block_table.shape[1]
    outs = [query.new_zeros((0, *query.shape[1:-1], value_cache.shape[-1]))]
    lses = [query.new_zeros((0, *query.shape[1:-1]), dtype=torch.promote_types(query.dtype, torch.float32))]
    for b, length in enumerate(cache_seqlens.tolist()):
        if not 0 <= length <= room * block_size:
            raise ValueError(
                f"[paged_attention] cache_seqlens: expected lengths of 0 to {room * block_size}, what block_table has "
                f"room for, but got {length} at index {b}"
            )
        blocks = block_table[b, : -(-length // block_size)].tolist()
        for n, block in enumerate(blocks):
            if not 0 <= block < count:
                raise ValueError(
                    f"[paged_attention] block_table: expected blocks of 0 to {count - 1} where there are keys, "
                    f"but got {block} at index {b}, {n}"
                )
        key, value = (
            cache[blocks].flatten(0, 1)[:length].transpose(0, 1).unsqueeze(0) for cache in (key_cache, value_cache)
        )
        out, lse = attention(
            query[b : b + 1],
            key,
            value,
            causal=causal,
            window=window,
            softcap=softcap,
            alibi_slopes=alibi_slopes[b] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes,
            sinks=sinks,
            scale=scale,
            causal_align="bottom_right",
            return_lse=True,
        )
        outs.append(out)
        lses.append(lse)
    out = torch.cat(outs)
    return (out, torch.cat(lses)) if return_lse else out
