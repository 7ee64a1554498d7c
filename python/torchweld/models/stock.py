"""The functions that the models take from `torchweld.ops`, on plain `torch.nn.functional`.

`GPT2(config, ops=torchweld.models.stock)` is the same model, parameter for parameter, on stock PyTorch: what
`torchweld train --compare` runs beside ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, dropout, gelu, layer_norm, linear, scaled_dot_product_attention

__all__ = [
    "add_layer_norm",
    "attention",
    "cross_entropy",
    "dropout",
    "gelu",
    "layer_norm",
    "linear_cross_entropy",
    "scaled_dot_product_attention",
]


def linear_cross_entropy(input: Tensor, weight: Tensor, target: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """The mean cross-entropy of the logits input @ weight^T, (*, H) and (V, H), for classes (*)."""
    logits = linear(input, weight).flatten(0, -2)
    return cross_entropy(logits, target.flatten(), label_smoothing=label_smoothing)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """(layer_norm(x + residual), x + residual), both of x's shape (*, *normalized_shape)."""
    total = x + residual
    return layer_norm(total, list(normalized_shape), weight, bias, eps), total


@lru_cache(maxsize=8)
def _band(rows: int, columns: int, left: int, device: torch.device) -> Tensor:
    """Which of the last keys each query sees: its own and `left` before it. (rows, columns) of bool."""
    seen = torch.ones(rows, columns, dtype=torch.bool, device=device).tril(columns - rows)
    return seen.triu(columns - rows - left)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    window: tuple[int, int],
    dropout_p: float,
    causal_align: str,
) -> Tensor:
    """Causal attention over a window, (B, H, N, D); torch has no form of it but a mask."""
    assert causal and window[1] == 0 and causal_align == "bottom_right"
    mask = _band(query.shape[2], key.shape[2], window[0], query.device)
    return scaled_dot_product_attention(query, key, value, mask, dropout_p)
