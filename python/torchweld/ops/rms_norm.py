"""rms_norm, plain and with a residual add in front: on the kernels of layer_norm, without mean and bias."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchweld import backend, reference
from torchweld.ops._arguments import NotDenseError, as_torch_does, check_dense, defined, flag, number, recordable
from torchweld.ops._norm import add_forward_op, inference_op, norm_of
from torchweld.ops._norm_autograd import add_layer_norm_function, layer_norm_function, layer_norm_node
from torchweld.ops._register import compiling, elsewhere, float32_under_autocast, wants_grad
from torchweld.ops.layer_norm import refusal_of, residual_refusal, sizes
from torchweld.reference.philox import draw_seed
from torchweld.reference.rms_norm import default_eps

_twin = torch.nn.functional.rms_norm
_whole = backend.whole_call("rms_norm")
_FLAG = "zero_centered_weight"


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
        TypeError: input is not floating point of 16 bits or more, or an argument is of another type.
        ValueError: weight is on another device than input.
    """
    if zero_centered_weight is False and not compiling():
        found = _whole(input=input, normalized_shape=normalized_shape, weight=weight, eps=eps)
        if found is True:
            norm = norm_of(normalized_shape[0], default_eps(input.dtype) if eps is None else eps, centred=False)
            return layer_norm_node(recordable(input), weight, None, norm)
        if found is not None:
            return found
    shape, zero_centered_weight = sizes("rms_norm", normalized_shape), flag("rms_norm", _FLAG, zero_centered_weight)
    if eps is not None:
        eps = number("rms_norm", "eps", eps, "a number or None")
    if theirs := elsewhere(rms_norm, None if zero_centered_weight else _twin, ("input", "weight"), input, weight):
        options = {"zero_centered_weight": True} if zero_centered_weight else {}
        return theirs(input, normalized_shape, weight, eps, **options)
    if input is None:
        check_dense("rms_norm", input=input)
    if input.is_cuda:  # as torch's norms do on a GPU; on the CPU they keep their dtype
        input, weight = float32_under_autocast(input, weight)
    try:
        refusal = refusal_of("rms_norm", input, shape, weight, None)
        if eps is None:
            eps = default_eps(input.dtype)
        if backend.choose("rms_norm", input.device, refusal) == "reference":
            tensors, options = {"input": input, "weight": weight}, {"zero_centered_weight": zero_centered_weight}
            return defined(reference.rms_norm, "rms_norm", tensors, input, shape, weight, eps, **options)
        norm = norm_of(math.prod(shape), eps, centred=False, weight_offset=float(zero_centered_weight))
        if wants_grad(input, weight):
            return layer_norm_function(recordable(input), weight, None, norm)
        return inference_op(input, weight, None, norm)
    except NotDenseError as error:
        if zero_centered_weight:
            raise
        return as_torch_does(error, _twin, input, normalized_shape, weight, eps)


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
        normalized_shape, weight, eps, zero_centered_weight: as in `rms_norm`. eps=None: the epsilon for x's dtype.
        x, residual, dropout_p, seed: as in `add_layer_norm`.

    Returns:
        (normed, new_residual), as `add_layer_norm`.

    Raises:
        RuntimeError, TypeError, ValueError: as `add_layer_norm`.
    """
    op, names = "add_rms_norm", ("x", "residual", "weight", "seed")
    shape, dropout_p = sizes(op, normalized_shape), number(op, "dropout_p", dropout_p)
    zero_centered_weight = flag(op, _FLAG, zero_centered_weight)
    if eps is not None:
        eps = number(op, "eps", eps, "a number or None")
    if theirs := elsewhere(add_rms_norm, None, names, x, residual, weight, seed):
        options = {"zero_centered_weight": zero_centered_weight, "seed": seed}
        return theirs(x, residual, shape, weight, eps, dropout_p, **options)
    refusal = residual_refusal(op, x, residual, dropout_p, seed)
    refusal = refusal_of(op, x, shape, weight, None) or refusal
    seed = (draw_seed(x.device) if seed is None else seed) if dropout_p > 0 else None
    if eps is None:
        eps = default_eps(x.dtype)
    if backend.choose(op, x.device, refusal) == "reference":
        tensors = dict(zip(names, (x, residual, weight, seed), strict=True))
        options = {"zero_centered_weight": zero_centered_weight, "seed": seed}
        return defined(reference.add_rms_norm, op, tensors, x, residual, shape, weight, eps, dropout_p, **options)
    norm = norm_of(math.prod(shape), eps, False, float(zero_centered_weight), dropout_p)
    if wants_grad(x, residual, weight):
        return add_layer_norm_function(x, residual, weight, None, seed, norm)
    return add_forward_op(x, residual, weight, None, seed, norm)[:2]
