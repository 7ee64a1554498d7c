"""Rotary position embeddings (Su, Lu, Pan, Murtadha, Wen, Liu: arXiv:2104.09864)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotary_tables(positions: Tensor, rotary_dim: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """(cos, sin) of position * base^(-2 i / rotary_dim) for every pair i: (*positions.shape, rotary_dim / 2).

    Computed in float64, since a large position times a float32 would be off by a part of the circle; float32.
    """
    pairs = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=torch.float64)
    angles = positions.double().unsqueeze(-1) * torch.pow(base, -pairs / rotary_dim)
    return angles.cos().float(), angles.sin().float()


def rotary_embedding(
    query: Tensor,
    key: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    seq_dim: int = -2,
    inplace: bool = False,
) -> Any:  # a tensor, or a pair of them
    """The first `rotary_dim` elements of every head, turned pair by pair: (x cos - z sin, z cos + x sin).

    A pair is (i, i + rotary_dim / 2) or, if `interleaved`, (2 i, 2 i + 1). Row n, or position_ids[n], of cos and sin
    belongs to token n. They have a column for each pair or for each element, in the order of the elements.
    """
    size = query.shape[-1] if rotary_dim is None else rotary_dim
    if cos is None or sin is None:
        if position_ids is None:
            position_ids = torch.arange(query.shape[seq_dim], device=query.device)
        (cos, sin), position_ids = rotary_tables(position_ids, size, base), None
    cos, sin = (_by_token(table, position_ids, size, interleaved) for table in (cos, sin))
    if seq_dim in (-2, 2):
        cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)
    else:
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)

    def turned(t: Tensor) -> Tensor:
        wide = t.to(torch.promote_types(t.dtype, torch.float32))
        x, rest = wide.narrow(-1, 0, size), wide.narrow(-1, size, wide.shape[-1] - size)
        if interleaved:
            first, second = x[..., 0::2], x[..., 1::2]
            crossed = torch.stack((-second, first), -1).flatten(-2)
        else:
            first, second = x.chunk(2, -1)
            crossed = torch.cat((-second, first), -1)
        out = torch.cat((x * cos + crossed * sin, rest), -1).to(t.dtype)
        return t.copy_(out) if inplace else out

    return turned(query) if key is None else (turned(query), turned(key))


def _by_token(table: Tensor, position_ids: Tensor | None, size: int, interleaved: bool) -> Tensor:
    """The table's row of each token, a column for each element: (N or B, N, rotary_dim)."""
    if position_ids is not None:
        if table.dim() == 2:
            rows = table.index_select(0, position_ids.flatten()).unflatten(0, position_ids.shape)
        else:
            ids = position_ids.expand(table.shape[0], position_ids.shape[-1])
            rows = table.gather(1, ids.unsqueeze(-1).expand(*ids.shape, table.shape[-1]))
        table = rows
    if table.shape[-1] == size:
        return table
    return table.repeat_interleave(2, -1) if interleaved else torch.cat((table, table), -1)
