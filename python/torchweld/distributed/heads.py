"""all_to_all_attention: the processes trade parts of the sequence for heads, and each attends to whole sequences.

Jacobs et al.: DeepSpeed Ulysses, arXiv:2309.14509. Four exchanges of what a process has, whatever the mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchweld.distributed.exchange import all_to_all
from torchweld.distributed.sequence import Spread
from torchweld.ops._attention import Modifiers, Options
from torchweld.ops._attention_autograd import attend

_OP = "all_to_all_attention"


def _gather_rows(t: Tensor, spread: Spread) -> Tensor:
    """(B, H, n, D) of all heads and a part of the rows -> (B, H / P, N, D), in the order of the sequence."""
    parts = all_to_all(torch.stack(t.chunk(spread.count, 1)), _OP, spread)
    return spread.in_order(list(parts.unbind()), 2)


def _gather_heads(t: Tensor, spread: Spread) -> Tensor:
    """The way back."""
    parts = all_to_all(torch.stack([spread.part(t, 2, rank) for rank in range(spread.count)]), _OP, spread)
    return torch.cat(parts.unbind(), 1)


def key_copies(heads: int, kv_heads: int, count: int) -> int:
    """How many times each key head must be there, so that every process has one. 0: heads do not fit the processes."""
    if heads % count:
        return 0
    if kv_heads % count == 0:
        return 1
    return count // kv_heads if count % kv_heads == 0 else 0


def attend_by_heads(
    spread: Spread,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    modifiers: Modifiers,
    options: Options,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """(output, lse) of this process's queries (B, H, n, D)."""
    heads, own = query.shape[1], query.shape[1] // spread.count
    copies = key_copies(heads, key.shape[1], spread.count)
    if copies > 1:
        key, value = (t.repeat_interleave(copies, 1) for t in (key, value))
    q, k, v = (_gather_rows(t, spread) for t in (query, key, value))
    mine = slice(spread.rank * own, (spread.rank + 1) * own)
    slopes, sinks, packed = modifiers.alibi_slopes, modifiers.sinks, modifiers.cu_seqlens_q is not None
    here = modifiers._replace(
        alibi_slopes=None if slopes is None else slopes[..., mine], sinks=None if sinks is None else sinks[mine]
    )
    placed = options._replace(mask_first=mine.start * q.shape[2], mask_heads=heads)
    if packed:
        q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
    output, lse = attend(_OP, True, q, k, v, here, placed, deterministic)
    if packed:
        output, lse = output.transpose(0, 1).unsqueeze(0), lse.unsqueeze(0)
    return _gather_heads(output, spread), _gather_heads(lse.unsqueeze(-1), spread).squeeze(-1)
