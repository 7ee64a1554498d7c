"""Texts to packed batches: tokens one after another, and where each text begins."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, with the tokenizer's own marks around them, cut where it cuts."""
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts))]


def pack(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """All tokens (total) of int64, and the bounds (sequences + 1) of int32."""
    bounds = torch.tensor([0, *map(len, sequences)]).cumsum(0).int()
    return torch.tensor([token for sequence in sequences for token in sequence]), bounds
