"""Layer norm (Ba, Kiros, Hinton: arXiv:1607.06450), plain and with a residual add in front."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchweld.reference.dropout import dropped


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
    centred = centred - centred.mean(dims, keepdim=True)  # corrects the rounding of the mean of large numbers
    y = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(compute)
    if bias is not None:
        y = y + bias.to(compute)
    return y.to(input.dtype)


def residual_sum(x: Tensor, residual: Tensor, shape: Sequence[int], dropout_p: float, seed: Tensor | None) -> Tensor:
    """residual + dropout(x), in residual's dtype. The mask has a row for each `shape` of elements."""
    return (residual + dropped(x, math.prod(shape), dropout_p, seed)).to(residual.dtype)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    *,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """new_residual = residual + dropout(x), in residual's dtype; returns (layer_norm(new_residual), new_residual).

    The norm has x's dtype.
    """
    new_residual = residual_sum(x, residual, normalized_shape, dropout_p, seed)
    compute = torch.promote_types(new_residual.dtype, torch.promote_types(x.dtype, torch.float32))
    return layer_norm(new_residual.to(compute), normalized_shape, weight, bias, eps).to(x.dtype), new_residual
