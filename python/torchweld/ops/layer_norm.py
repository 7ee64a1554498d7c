"""layer_norm and add_layer_norm: one pair of kernels, with or without a residual add in front of the norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchweld import backend, reference
from torchweld.ops.library import applier, double_backward, register, wants_definition, wants_grad

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))

# ---- Implementation. The kernels see M rows of `cols` elements, whatever the shape; they fill what is allocated here.


def _parameters(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Of x's dtype where both are, else float32, which holds the others exactly; contiguous."""
    dtype = x.dtype
    if (weight is not None and weight.dtype is not dtype) or (bias is not None and bias.dtype is not dtype):
        weight, bias = (None if p is None else p.float() for p in (weight, bias))
    return None if weight is None else weight.contiguous(), None if bias is None else bias.contiguous()


def _run_forward(
    input: Tensor,
    residual: Tensor | None,
    cols: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    total: Tensor | None,
    stats: Tensor | None,
) -> Tensor:
    output = torch.empty_like(input)
    weight, bias = _parameters(input, weight, bias)
    backend.kernels[input.device.type].layer_norm_forward(
        input, residual, cols, weight, bias, eps, total, output, stats
    )
    return output


def _stats(x: Tensor, cols: int) -> Tensor:
    return x.new_empty((2, x.numel() // cols), dtype=torch.float32)


def _inference(input: Tensor, cols: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return _run_forward(input.contiguous(), None, cols, weight, bias, eps, None, None)


def _forward(input: Tensor, cols: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    stats = _stats(input, cols)
    return _run_forward(input.contiguous(), None, cols, weight, bias, eps, None, stats), stats


def _add_forward(
    x: Tensor, residual: Tensor, cols: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    x, stats = x.contiguous(), _stats(x, cols)
    total = torch.empty_like(x)
    return _run_forward(x, residual.contiguous(), cols, weight, bias, eps, total, stats), total, stats


def _backward(
    doutput: Tensor,
    dsum: Tensor | None,
    input: Tensor,
    cols: int,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    x = input.contiguous()
    w, b = _parameters(x, weight, bias)
    dinput = torch.empty_like(x) if mask[0] else None
    dweight = torch.empty_like(w) if w is not None and mask[1] else None
    dbias = torch.empty_like(b) if b is not None and mask[2] else None
    kernels = backend.kernels[x.device.type]
    weights = dweight is not None or dbias is not None
    blocks = kernels.layer_norm_workspace(x.numel() // cols, cols, weights, x.get_device())
    kernels.layer_norm_backward(
        doutput.contiguous(),
        None if dsum is None else dsum.contiguous(),
        x,
        cols,
        w,
        stats,
        dinput,
        dweight,
        dbias,
        x.new_empty((blocks, 2, cols), dtype=torch.float32) if blocks else None,
    )
    return (
        x.new_empty(0) if dinput is None else dinput,
        x.new_empty(0) if dweight is None or weight is None else dweight.to(weight.dtype),
        x.new_empty(0) if dbias is None or bias is None else dbias.to(bias.dtype),
    )


# ---- Fake


def _inference_fake(input: Tensor, cols: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def _forward_fake(
    input: Tensor, cols: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(input, memory_format=torch.contiguous_format), _stats(input, cols)


def _add_forward_fake(
    x: Tensor, residual: Tensor, cols: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    output, stats = _forward_fake(x, cols, weight, bias, eps)
    return output, torch.empty_like(output), stats


def _backward_fake(
    doutput: Tensor,
    dsum: Tensor | None,
    input: Tensor,
    cols: int,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    def like(t: Tensor | None, wanted: bool) -> Tensor:
        if t is None or not wanted:
            return input.new_empty(0)
        return torch.empty_like(t, memory_format=torch.contiguous_format)

    return like(input, mask[0]), like(weight, mask[1]), like(bias, mask[2])


_inference_op = register(
    "layer_norm(Tensor input, SymInt cols, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    _inference,
    _inference_fake,
)
_forward_op = register(
    "layer_norm_forward(Tensor input, SymInt cols, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor output, Tensor stats)",
    _forward,
    _forward_fake,
)
_add_forward_op = register(
    "add_layer_norm_forward(Tensor x, Tensor residual, SymInt cols, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor output, Tensor sum, Tensor stats)",
    _add_forward,
    _add_forward_fake,
)
_backward_op = register(
    "layer_norm_backward(Tensor doutput, Tensor? dsum, Tensor input, SymInt cols, Tensor? weight, Tensor? bias,"
    " Tensor stats, bool[3] mask) -> (Tensor dinput, Tensor dweight, Tensor dbias)",
    _backward,
    _backward_fake,
)

# ---- Autograd


def _gradients(
    ctx: Any, doutput: Tensor, dsum: Tensor | None, mask: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of what was normalised, of weight and of bias; None where `mask` does not ask."""
    x, weight, bias, stats = ctx.saved_tensors
    shape, eps = ctx.norm
    if wants_definition(doutput, dsum):

        def function(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
            return reference.layer_norm(x, shape, weight, bias, eps), x.clone()

        dx, dw, db = double_backward(function, (x, weight, bias), (doutput, dsum), mask)
    else:
        dx, dw, db = _backward_op(doutput, dsum, x, math.prod(shape), weight, bias, stats, mask)
    return dx if mask[0] else None, dw if mask[1] else None, db if mask[2] else None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        output, stats = _forward_op(input, math.prod(shape), weight, bias, eps)
        ctx.save_for_backward(input, weight, bias, stats)
        ctx.norm = shape, eps
        return output

    @staticmethod
    def backward(ctx: Any, doutput: Tensor) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad
        dx, dw, db = _gradients(ctx, doutput, None, (need[0], need[2], need[3]))
        return dx, None, dw, db, None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        shape: Sequence[int],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        output, total, stats = _add_forward_op(x, residual, math.prod(shape), weight, bias, eps)
        # Only the sum is kept for the backward: x and residual can be freed.
        ctx.save_for_backward(total, weight, bias, stats)
        ctx.norm = shape, eps
        ctx.set_materialize_grads(False)
        return output, total

    @staticmethod
    def backward(ctx: Any, doutput: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad
        if doutput is None:  # only new_residual was used
            return dsum, dsum, None, None, None, None
        ds, dw, db = _gradients(ctx, doutput, dsum, (need[0] or need[1], need[3], need[4]))
        return ds if need[0] else None, ds if need[1] else None, None, dw, db, None


_layer_norm = applier(_LayerNorm)
_add_layer_norm = applier(_AddLayerNorm)

# ---- Public


def _refusal(op: str, x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None) -> str | None:
    """Raises on arguments that no backend takes; returns why the kernels do not take these, None if they do."""
    tail, dtype = x.shape[-len(shape) :] if shape else None, x.dtype
    if tail is None or (tail != shape and tuple(tail) != tuple(shape)):
        raise RuntimeError(
            f"[{op}] input: expected a shape that ends in normalized_shape {list(shape)}, but got {list(x.shape)}"
        )
    if dtype not in _DTYPES and not dtype.is_floating_point:
        raise TypeError(f"[{op}] input: expected a floating-point dtype, but got {dtype}")
    for p in (weight, bias):
        if p is None:
            continue
        if p.shape != tail:
            name = "weight" if p is weight else "bias"
            raise RuntimeError(f"[{op}] {name}: expected shape {list(shape)}, but got {list(p.shape)}")
        if p.dtype is not dtype and p.dtype not in _DTYPES:
            return f"a parameter of dtype {p.dtype}"
    if dtype not in _DTYPES:
        return f"input of dtype {dtype}"
    return "rows without elements" if 0 in tail else None


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer norm over the trailing `normalized_shape`; drop-in for `torch.nn.functional.layer_norm`.

    y = (input - mean) / sqrt(variance + eps) * weight + bias (Ba, Kiros, Hinton: arXiv:1607.06450). Statistics are
    float32, the output has input's dtype. Weight and bias may have another floating dtype than the input.

    Args:
        input: (*, *normalized_shape), float32, bfloat16 or float16 (others run on the reference).
        normalized_shape: the trailing dimensions to normalise over.
        weight, bias: normalized_shape, or None.
        eps: added to the variance.

    Raises:
        RuntimeError: a shape or device does not fit.
        TypeError: input is not floating point.
    """
    refusal = _refusal("layer_norm", input, normalized_shape, weight, bias)
    if backend.choose("layer_norm", input.device, refusal) == "reference":
        return reference.layer_norm(input, normalized_shape, weight, bias, eps)
    if wants_grad(input, weight, bias):
        return _layer_norm(input, normalized_shape, weight, bias, eps)
    return _inference_op(input, math.prod(normalized_shape), weight, bias, eps)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Residual add and layer norm in one pass: new_residual = x + residual, normed = layer_norm(new_residual).

    Args:
        x, residual: (*, *normalized_shape), of one shape, dtype and device.
        normalized_shape, weight, bias, eps: as in `layer_norm`.

    Returns:
        (normed, new_residual), both in x's dtype. new_residual is rounded to that dtype before it is normalised.

    Raises:
        RuntimeError, TypeError: as in `layer_norm`; also when x and residual differ in shape, dtype or device.
    """
    for what, expected, got in (
        ("shape", x.shape, residual.shape),
        ("dtype", x.dtype, residual.dtype),
        ("device", x.device, residual.device),
    ):
        if expected != got:
            raise RuntimeError(f"[add_layer_norm] residual: expected x's {what} {expected}, but got {got}")
    refusal = _refusal("add_layer_norm", x, normalized_shape, weight, bias)
    if backend.choose("add_layer_norm", x.device, refusal) == "reference":
        return reference.add_layer_norm(x, residual, normalized_shape, weight, bias, eps)
    if wants_grad(x, residual, weight, bias):
        return _add_layer_norm(x, residual, normalized_shape, weight, bias, eps)
    return _add_forward_op(x, residual, math.prod(normalized_shape), weight, bias, eps)[:2]
