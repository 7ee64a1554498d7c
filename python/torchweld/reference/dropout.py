"""Dropout (Srivastava et al.: A Simple Way to Prevent Neural Networks from Overfitting, JMLR 15, 2014)."""

from __future__ import annotations

import torch
from torch import Tensor

from torchweld.reference.philox import draw_seed, dropout_factors


def dropped(x: Tensor, cols: int, p: float, seed: Tensor | None) -> Tensor:
    """x in float32 at least, as rows of `cols`. An element is dropped with probability p, else divided by 1 - p."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if p == 0 or x.numel() == 0:
        return x
    factors = dropout_factors(draw_seed(x.device) if seed is None else seed, x.numel() // cols, cols, p)
    return x * factors.to(x.dtype).view(x.shape)


def dropout(input: Tensor, p: float = 0.5, training: bool = True, *, seed: Tensor | None = None) -> Tensor:
    """input * factors, in input's dtype: those of `dropout_factors` for rows along the last dimension.

    Input itself where nothing is dropped.
    """
    if not training or p == 0 or input.numel() == 0:
        return input
    return dropped(input, input.shape[-1] if input.dim() else 1, p, seed).to(input.dtype)
