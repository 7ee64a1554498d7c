"""Sequences of unequal lengths in one batch: one after another without padding, or padded to the longest.

The models take them packed: tokens (total), and where each sequence begins. torchweld's attention reads them so; stock
PyTorch has no form of it, and its layers work on the padding too.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from torchweld.models import stock


class Packed:
    """As they come: (total, C)."""

    def __init__(self, cu_seqlens: Tensor, ops: ModuleType) -> None:
        self.cu_seqlens, self.ops = cu_seqlens, ops
        self.longest = int(cu_seqlens.diff().max())

    def spread(self, x: Tensor) -> Tensor:
        """From (total, C)."""
        return x

    def gather(self, x: Tensor) -> Tensor:
        """To (total, C)."""
        return x

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, seen: Packed | None = None, causal: bool = False
    ) -> Tensor:
        """Each sequence to itself, or to that of the same number in `seen`: (total, H, D) three times -> as q."""
        seen = seen or self
        return self.ops.attention(
            q, k, v, causal=causal, dropout_p=dropout, cu_seqlens_q=self.cu_seqlens, cu_seqlens_k=seen.cu_seqlens,
            max_seqlen_q=self.longest, max_seqlen_k=seen.longest,
        )  # fmt: skip


class Padded:
    """In rows of the longest: (B, N, C), zeros behind each."""

    def __init__(self, cu_seqlens: Tensor, ops: ModuleType) -> None:
        lengths = cu_seqlens.diff()
        longest = int(lengths.max())
        real = torch.arange(longest, device=lengths.device) < lengths[:, None]  # (B, N)
        self.shape, self.index = real.shape, real.flatten().nonzero()[:, 0]
        self.mask = real[:, None, None]
        self.ops = ops

    def spread(self, x: Tensor) -> Tensor:
        """From (total, C)."""
        rows = x.new_zeros(self.shape.numel(), x.shape[-1]).index_copy(0, self.index, x)
        return rows.view(*self.shape, -1)

    def gather(self, x: Tensor) -> Tensor:
        """To (total, C)."""
        return x.flatten(0, 1)[self.index]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, seen: Padded | None = None, causal: bool = False
    ) -> Tensor:
        """Each sequence to itself, or to that of the same number in `seen`: (B, N, H, D) three times -> as q."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = None if causal else (seen or self).mask  # the padding stands behind all that a real token sees
        return self.ops.scaled_dot_product_attention(q, k, v, mask, dropout, causal).transpose(1, 2)


def arrange(cu_seqlens: Tensor, ops: ModuleType) -> Packed | Padded:
    """The form that `ops` are good at. cu_seqlens: (B + 1) of int32, where each sequence starts, and the total."""
    return (Padded if ops is stock else Packed)(cu_seqlens, ops)


def positions(cu_seqlens: Tensor) -> Tensor:
    """Of each token in its sequence: (total)."""
    lengths = cu_seqlens.diff()
    starts = torch.repeat_interleave(cu_seqlens[:-1], lengths)
    return torch.arange(len(starts), device=starts.device) - starts
