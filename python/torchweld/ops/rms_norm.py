"""rms_norm, plain and with a residual add in front: on the kernels of layer_norm, without mean and bias."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from torchweld import backend, reference
from torchweld.ops.layer_norm import check_residual, refusal_of
from torchweld.ops.layer_norm_op import add_forward_op, add_layer_norm_function, inference_op, layer_norm_function
from torchweld.ops.library import float32_under_autocast, wants_grad
from torchweld.reference.rms_norm import default_eps


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
        RuntimeError: a shape or device does not fit.
        TypeError: input is not floating point.
    """
    if input.is_cuda:  # as torch's; on the CPU its norms keep their dtype
        input, weight = float32_under_autocast(input, weight)
    refusal = refusal_of("rms_norm", input, normalized_shape, weight, None)
    if eps is None:
        eps = default_eps(input.dtype)
    if backend.choose("rms_norm", input.device, refusal) == "reference":
        return reference.rms_norm(input, normalized_shape, weight, eps, zero_centered_weight=zero_centered_weight)
    if wants_grad(input, weight):
        return layer_norm_function(input, normalized_shape, weight, None, eps, False, float(zero_centered_weight))
    return inference_op(input, math.prod(normalized_shape), weight, None, eps, False, float(zero_centered_weight))


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    zero_centered_weight: bool = False,
) -> tuple[Tensor, Tensor]:
    """Residual add and RMS norm in one pass: new_residual = x + residual, normed = rms_norm(new_residual).

    Args:
        x, residual: (*, *normalized_shape), of one shape, dtype and device.
        normalized_shape, weight, eps, zero_centered_weight: as in `rms_norm`.

    Returns:
        (normed, new_residual), both in x's dtype. new_residual is rounded to that dtype before it is normalised.

    Raises:
        RuntimeError, TypeError: as in `rms_norm`; also when x and residual differ in shape, dtype or device.
    """
    check_residual("add_rms_norm", x, residual)
    refusal = refusal_of("add_rms_norm", x, normalized_shape, weight, None)
    if eps is None:
        eps = default_eps(x.dtype)
    if backend.choose("add_rms_norm", x.device, refusal) == "reference":
        return reference.add_rms_norm(
            x, residual, normalized_shape, weight, eps, zero_centered_weight=zero_centered_weight
        )
    offset = float(zero_centered_weight)
    if wants_grad(x, residual, weight):
        return add_layer_norm_function(x, residual, normalized_shape, weight, None, eps, False, offset)
    return add_forward_op(x, residual, math.prod(normalized_shape), weight, None, eps, False, offset)[:2]
