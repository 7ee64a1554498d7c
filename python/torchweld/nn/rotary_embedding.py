"""Rotary embeddings as a module that keeps its tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchweld import ops
from torchweld.ops._arguments import integer, number
from torchweld.ops.rotary_embedding import rotary_tables


class RotaryEmbedding(torch.nn.Module):
    """`torchweld.ops.rotary_embedding` with tables for the positions 0 to max_positions - 1.

    The tables are float32 whatever dtype the module is converted to, and no part of its state_dict.

    Args:
        dim: how many elements of a head are turned, an even number.
        max_positions: rows of the tables.
        base: of the angles, position * base^(-2 i / dim) for pair i.
        interleaved: a pair is (2 i, 2 i + 1); else (i, i + dim / 2).
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        dim: int,
        max_positions: int = 2048,
        base: float = 10000.0,
        *,
        interleaved: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.max_positions = integer("RotaryEmbedding", "dim", dim), max_positions
        if self.dim < 2 or self.dim % 2:
            raise ValueError(f"[RotaryEmbedding] dim: expected an even number from 2 on, but got {dim}")
        self.base, self.interleaved = number("RotaryEmbedding", "base", base), interleaved
        self._make(device)

    def _make(self, device: torch.device | str | None) -> None:
        cos, sin = rotary_tables(torch.arange(self.max_positions, device=device), self.dim, self.base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Of .to(), .half() and such: the tables move, and keep their digits. A module made on meta gets them here."""
        had_none = self.cos.is_meta
        super()._apply(fn, recurse)
        if self.cos.dtype is not torch.float32 or had_none:
            self.reset_parameters()
        return self

    def reset_parameters(self) -> None:
        """Makes the tables again where they are, as FSDP asks of a module after `to_empty()`."""
        self._make(self.cos.device)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        seq_dim: int = -2,
        inplace: bool = False,
    ) -> Any:
        """As in `torchweld.ops.rotary_embedding`: query's turned tensor, with a key the pair of both."""
        cos, sin = self.cos, self.sin
        if position_ids is None:
            if (tokens := query.shape[seq_dim]) > self.max_positions:
                raise ValueError(
                    f"[RotaryEmbedding] query: expected at most {self.max_positions} tokens, but got {tokens}; make it "
                    f"with max_positions={tokens}"
                )
            cos, sin = cos[:tokens], sin[:tokens]
        return ops.rotary_embedding(
            query,
            key,
            cos,
            sin,
            position_ids=position_ids,
            interleaved=self.interleaved,
            rotary_dim=self.dim,
            seq_dim=seq_dim,
            inplace=inplace,
        )

    def extra_repr(self) -> str:
        return f"{self.dim}, max_positions={self.max_positions}, base={self.base}, interleaved={self.interleaved}"
