"""Layer norm (Ba, Kiros, Hinton: arXiv:1607.06450), plain and with a residual add in front."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """(input - mean) / sqrt(variance + eps) * weight + bias over the trailing `normalized_shape`, in input's dtype.

    Computed in float32 at least, whatever the dtypes of input, weight and bias.
    """
    dims = tuple(range(-len(normalized_shape), 0))
    compute = torch.promote_types(input.dtype, torch.float32)
    x = input.to(compute)
    centred = x - x.mean(dims, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(compute)
    if bias is not None:
        y = y + bias.to(compute)
    return y.to(input.dtype)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """new_residual = x + residual; returns (layer_norm(new_residual), new_residual)."""
    new_residual = x + residual
    return layer_norm(new_residual, normalized_shape, weight, bias, eps), new_residual
