"""rms_norm, plain and with a residual add in front: on the kernels of layer_norm, without mean and bias."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchweld import backend, reference
from torchweld.ops._norm import add_forward_op, inference_op
from torchweld.ops._norm_autograd import add_layer_norm_function, layer_norm_function
from torchweld.ops._register import (
    NotDenseError,
    as_torch_does,
    check_dense,
    check_memory,
    elsewhere,
    float32_under_autocast,
    wants_grad,
)
from torchweld.ops.layer_norm import refusal_of, residual_refusal
from torchweld.reference.philox import draw_seed
from torchweld.reference.rms_norm import default_eps

_twin = torch.nn.functional.rms_norm


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    zero_centered_weight: bool = False,
) -> Tensor:
    """RMS norm over the trailing `normalized_shape`; drop-in for `torch.nn.functional.rms_norm`.

    y = input / sqrt(mean(input^2) + eps) * weight (Zhang, Sennrich: arXiv:1910.07467). Statistics are float32, the
    output has input's dtype. The weight may have another floating dtype than the input.

    Args:
        input: (*, *normalized_shape), float32, bfloat16 or float16 (others run on the reference).
        normalized_shape: the trailing dimensions to normalise over.
        weight: normalized_shape, or None.
        eps: added to the mean square; None: the epsilon of float32 (for a float64 input that of float64), as in torch.
        zero_centered_weight: multiply by 1 + weight instead, as Gemma does; the sum is float32.

    Raises:
        RuntimeError: a shape does not fit.
        TypeError: input or weight is not floating point.
        ValueError: weight is on another device than input.
    """
    if theirs := elsewhere(rms_norm, None if zero_centered_weight else _twin, ("input", "weight"), input, weight):
        options = {"zero_centered_weight": True} if zero_centered_weight else {}
        return theirs(input, normalized_shape, weight, eps, **options)
    if input is None:
        check_dense("rms_norm", input=input)
    if input.is_cuda:  # as torch's; on the CPU its norms keep their dtype
        input, weight = float32_under_autocast(input, weight)
    try:
        refusal = refusal_of("rms_norm", input, normalized_shape, weight, None)
    except NotDenseError as error:
        return as_torch_does(error, _twin, input, normalized_shape, weight, eps)
    if eps is None:
        eps = default_eps(input.dtype)
    if backend.choose("rms_norm", input.device, refusal) == "reference":
        check_memory("rms_norm", input=input, weight=weight, eps=eps)
        return reference.rms_norm(input, normalized_shape, weight, eps, zero_centered_weight=zero_centered_weight)
    if wants_grad(input, weight):
        return layer_norm_function(input, weight, None, (normalized_shape, eps, False, float(zero_centered_weight)))
    return inference_op(input, math.prod(normalized_shape), weight, None, eps, False, float(zero_centered_weight))


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
    """Dropout, residual add and RMS norm in one pass.

    new_residual = residual + dropout(x, dropout_p), normed = rms_norm(new_residual).

    Args:
        normalized_shape, weight, eps, zero_centered_weight: as in `rms_norm`; eps=None goes by x's dtype.
        x, residual, dropout_p, seed: as in `add_layer_norm`.

    Returns:
        (normed, new_residual), as `add_layer_norm`.

    Raises:
        RuntimeError, TypeError, ValueError: as `add_layer_norm`.
    """
    if theirs := elsewhere(add_rms_norm, None, ("x", "residual", "weight", "seed"), x, residual, weight, seed):
        options = {"zero_centered_weight": zero_centered_weight, "seed": seed}
        return theirs(x, residual, normalized_shape, weight, eps, dropout_p, **options)
    refusal = residual_refusal("add_rms_norm", x, residual, dropout_p, seed)
    refusal = refusal_of("add_rms_norm", x, normalized_shape, weight, None) or refusal
    seed = (draw_seed(x.device) if seed is None else seed) if dropout_p > 0 else None
    if eps is None:
        eps = default_eps(x.dtype)
    if backend.choose("add_rms_norm", x.device, refusal) == "reference":
        check_memory("add_rms_norm", x=x, residual=residual, weight=weight, eps=eps, seed=seed)
        return reference.add_rms_norm(
            x,
            residual,
            normalized_shape,
            weight,
            eps,
            dropout_p,
            zero_centered_weight=zero_centered_weight,
            seed=seed,
        )
    offset = float(zero_centered_weight)
    if wants_grad(x, residual, weight):
        return add_layer_norm_function(x, residual, normalized_shape, weight, None, eps, False, offset, dropout_p, seed)
    cols = math.prod(normalized_shape)
    return add_forward_op(x, residual, cols, weight, None, eps, False, offset, dropout_p, seed)[:2]
