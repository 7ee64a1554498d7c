"""RMS norm (Zhang, Sennrich: arXiv:1910.07467), plain and with a residual add in front."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchweld.reference.layer_norm import residual_sum


def default_eps(dtype: torch.dtype) -> float:
    """The epsilon for `eps=None`, as in torch: the machine epsilon of the arithmetic, float32 at least."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    zero_centered_weight: bool = False,
) -> Tensor:
    """input / sqrt(mean(input^2) + eps) * weight over the trailing `normalized_shape`, in input's dtype.

    Computed in float32 at least, whatever the dtypes of input and weight. A zero-centred weight is stored minus 1.
    """
    dims = tuple(range(-len(normalized_shape), 0))
    compute = torch.promote_types(input.dtype, torch.float32)
    x = input.to(compute)
    y = x * torch.rsqrt(x.square().mean(dims, keepdim=True) + (default_eps(input.dtype) if eps is None else eps))
    if weight is not None:
        w = weight.to(compute)
        y = y * (w + 1 if zero_centered_weight else w)
    return y.to(input.dtype)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    dropout_p: float = 0.0,
    *,
    zero_centered_weight: bool = False,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """new_residual = residual + dropout(x), in residual's dtype; returns (rms_norm(new_residual), new_residual).

    The norm has x's dtype.
    """
    new_residual = residual_sum(x, residual, normalized_shape, dropout_p, seed)
    compute = torch.promote_types(new_residual.dtype, torch.promote_types(x.dtype, torch.float32))
    normed = rms_norm(
        new_residual.to(compute), normalized_shape, weight, eps, zero_centered_weight=zero_centered_weight
    )
    return normed.to(x.dtype), new_residual
