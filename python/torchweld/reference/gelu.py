"""The Gaussian error linear unit (Hendrycks, Gimpel: arXiv:1606.08415)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """input * Phi(input), with Phi the normal distribution function or, for "tanh", the approximation of it.

    Computed in float32 at least, returned in input's dtype.
    """
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    # 1 + tanh and 1 + erf would cancel far below zero.
    if approximate == "tanh":
        u = 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        below = torch.sigmoid(torch.where(u < 0, u, -u))  # the slope would cancel far above zero
        phi = torch.where(u < 0, below, 1 - below)
    else:
        phi = 0.5 * torch.special.erfc(-x / math.sqrt(2))
    return (x * phi).to(input.dtype)
