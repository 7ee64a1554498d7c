"""What rotary_embedding asks of the shapes, dtypes and devices of its tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from torchweld.ops._arguments import check_dense, check_float


def check_heads(op: str, query: Tensor, key: Tensor | None, seq_dim: int) -> None:
    heads = -3 if seq_dim == -2 else -2
    for name, t in (("query", query), ("key", key)):
        if t is None:
            continue
        check_dense(op, **{name: t})
        check_float(op, name, t.dtype)
        if t.dim() != 4:
            raise RuntimeError(f"[{op}] {name}: expected 4 dimensions, but got shape {list(t.shape)}")
        if t.device != query.device:
            raise RuntimeError(f"[{op}] {name}: expected query's device {query.device}, but got {t.device}")
    if key is not None:
        expected = list(query.shape)
        expected[heads] = key.shape[heads]
        if list(key.shape) != expected:
            raise RuntimeError(
                f"[{op}] key: expected query's shape but for its heads, {expected}, but got {list(key.shape)}"
            )


def check_positions(op: str, query: Tensor, position_ids: Tensor, seq_dim: int) -> None:
    check_dense(op, position_ids=position_ids)
    if position_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"[{op}] position_ids: expected dtype torch.int64, but got {position_ids.dtype}")
    batch, tokens = query.shape[0], query.shape[seq_dim]
    count = position_ids.dim()
    fits = count in (1, 2) and position_ids.shape[-1] == tokens
    if not fits or (count == 2 and position_ids.shape[0] != 1 and position_ids.shape[0] != batch):
        expected = f"shape {[tokens]} or {[batch, tokens]}"
        raise RuntimeError(f"[{op}] position_ids: expected {expected}, but got {list(position_ids.shape)}")
    if position_ids.device != query.device:
        raise RuntimeError(
            f"[{op}] position_ids: expected query's device {query.device}, but got {position_ids.device}"
        )


def check_tables(op: str, query: Tensor, cos: Tensor, sin: Tensor, tokens: int | None, rotary_dim: int) -> None:
    """`tokens`: how many rows they must have; None where position_ids says which are read."""
    for name, table in (("cos", cos), ("sin", sin)):
        check_dense(op, **{name: table})
        check_float(op, name, table.dtype)
        if table.device != query.device:
            raise RuntimeError(f"[{op}] {name}: expected query's device {query.device}, but got {table.device}")
        shape, batch = list(table.shape), query.shape[0]
        if table.dim() not in (2, 3) or (table.dim() == 3 and shape[0] != 1 and shape[0] != batch):
            raise RuntimeError(
                f"[{op}] {name}: expected 2 dimensions, or {batch} in front of them, but got shape {shape}"
            )
        if shape[-1] != rotary_dim and 2 * shape[-1] != rotary_dim:
            expected = (
                f"{rotary_dim} columns or {rotary_dim // 2}, an element or a pair of rotary_dim={rotary_dim} each"
            )
            raise RuntimeError(f"[{op}] {name}: expected {expected}, but got shape {shape}")
        if tokens is not None and shape[-2] != tokens:
            expected = f"{tokens} rows, a token each"
            raise RuntimeError(f"[{op}] {name}: expected {expected}, but got shape {shape}; give position_ids")
    if sin.shape[-2] != cos.shape[-2]:
        raise RuntimeError(f"[{op}] sin: expected cos's {cos.shape[-2]} rows, but got shape {list(sin.shape)}")
