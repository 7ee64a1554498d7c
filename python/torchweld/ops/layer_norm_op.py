"""The registered ops behind layer_norm, rms_norm and their add_ forms: implementation, fake and autograd.

One pair of kernels serves all four: a residual is added in front where there is one, and RMS norm is the layer norm
that is not centred and has no bias. `weight_offset` is 1 for a zero-centred weight, else 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchweld import backend, reference
from torchweld.ops.library import applier, double_backward, register, wants_definition

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
    centred: bool,
    weight_offset: float,
    total: Tensor | None,
    stats: Tensor | None,
) -> Tensor:
    output = torch.empty_like(input)
    weight, bias = _parameters(input, weight, bias)
    backend.kernels[input.device.type].layer_norm_forward(
        input, residual, cols, weight, bias, eps, centred, weight_offset, total, output, stats
    )
    return output


def _stats(x: Tensor, cols: int, centred: bool) -> Tensor:
    """Mean and rstd of each row, or rstd alone."""
    return x.new_empty((1 + centred, x.numel() // cols), dtype=torch.float32)


def _inference(
    input: Tensor,
    cols: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool = True,
    weight_offset: float = 0.0,
) -> Tensor:
    return _run_forward(input.contiguous(), None, cols, weight, bias, eps, centred, weight_offset, None, None)


def _forward(
    input: Tensor,
    cols: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool = True,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    stats = _stats(input, cols, centred)
    return _run_forward(input.contiguous(), None, cols, weight, bias, eps, centred, weight_offset, None, stats), stats


def _add_forward(
    x: Tensor,
    residual: Tensor,
    cols: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool = True,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    x, stats = x.contiguous(), _stats(x, cols, centred)
    total = torch.empty_like(x)
    output = _run_forward(x, residual.contiguous(), cols, weight, bias, eps, centred, weight_offset, total, stats)
    return output, total, stats


def _backward(
    doutput: Tensor,
    dsum: Tensor | None,
    input: Tensor,
    cols: int,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    mask: Sequence[bool],
    weight_offset: float = 0.0,
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
        stats.shape[0] == 2,
        weight_offset,
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


def _inference_fake(
    input: Tensor,
    cols: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool = True,
    weight_offset: float = 0.0,
) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def _forward_fake(
    input: Tensor,
    cols: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool = True,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(input, memory_format=torch.contiguous_format), _stats(input, cols, centred)


def _add_forward_fake(
    x: Tensor,
    residual: Tensor,
    cols: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool = True,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    output, stats = _forward_fake(x, cols, weight, bias, eps, centred)
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
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    def like(t: Tensor | None, wanted: bool) -> Tensor:
        if t is None or not wanted:
            return input.new_empty(0)
        return torch.empty_like(t, memory_format=torch.contiguous_format)

    return like(input, mask[0]), like(weight, mask[1]), like(bias, mask[2])


inference_op = register(
    "layer_norm(Tensor input, SymInt cols, Tensor? weight, Tensor? bias, float eps, bool centred=True,"
    " float weight_offset=0.0) -> Tensor",
    _inference,
    _inference_fake,
)
_forward_op = register(
    "layer_norm_forward(Tensor input, SymInt cols, Tensor? weight, Tensor? bias, float eps, bool centred=True,"
    " float weight_offset=0.0) -> (Tensor output, Tensor stats)",
    _forward,
    _forward_fake,
)
add_forward_op = register(
    "add_layer_norm_forward(Tensor x, Tensor residual, SymInt cols, Tensor? weight, Tensor? bias, float eps,"
    " bool centred=True, float weight_offset=0.0) -> (Tensor output, Tensor sum, Tensor stats)",
    _add_forward,
    _add_forward_fake,
)
_backward_op = register(
    "layer_norm_backward(Tensor doutput, Tensor? dsum, Tensor input, SymInt cols, Tensor? weight, Tensor? bias,"
    " Tensor stats, bool[3] mask, float weight_offset=0.0) -> (Tensor dinput, Tensor dweight, Tensor dbias)",
    _backward,
    _backward_fake,
)

# ---- Autograd


def _gradients(
    ctx: Any, doutput: Tensor, dsum: Tensor | None, mask: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of what was normalised, of weight and of bias; None where `mask` does not ask."""
    x, weight, bias, stats = ctx.saved_tensors
    shape, eps, centred, weight_offset = ctx.norm
    if wants_definition(doutput, dsum):

        def function(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
            if centred:
                return reference.layer_norm(x, shape, weight, bias, eps), x.clone()
            return reference.rms_norm(x, shape, weight, eps, zero_centered_weight=weight_offset != 0), x.clone()

        dx, dw, db = double_backward(function, (x, weight, bias), (doutput, dsum), mask)
    else:
        dx, dw, db = _backward_op(doutput, dsum, x, math.prod(shape), weight, bias, stats, mask, weight_offset)
    return dx if mask[0] else None, dw if mask[1] else None, db if mask[2] else None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        shape: Sequence[int],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        centred: bool,
        weight_offset: float,
    ) -> Tensor:
        output, stats = _forward_op(input, math.prod(shape), weight, bias, eps, centred, weight_offset)
        ctx.save_for_backward(input, weight, bias, stats)
        ctx.norm = shape, eps, centred, weight_offset
        return output

    @staticmethod
    def backward(ctx: Any, doutput: Tensor) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad
        dx, dw, db = _gradients(ctx, doutput, None, (need[0], need[2], need[3]))
        return dx, None, dw, db, None, None, None


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
        centred: bool,
        weight_offset: float,
    ) -> tuple[Tensor, Tensor]:
        output, total, stats = add_forward_op(x, residual, math.prod(shape), weight, bias, eps, centred, weight_offset)
        # Only the sum is kept for the backward: x and residual can be freed.
        ctx.save_for_backward(total, weight, bias, stats)
        ctx.norm = shape, eps, centred, weight_offset
        ctx.set_materialize_grads(False)
        return output, total

    @staticmethod
    def backward(ctx: Any, doutput: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad
        if doutput is None:  # only new_residual was used
            return dsum, dsum, None, None, None, None, None, None
        ds, dw, db = _gradients(ctx, doutput, dsum, (need[0] or need[1], need[3], need[4]))
        return ds if need[0] else None, ds if need[1] else None, None, dw, db, None, None, None


layer_norm_function = applier(_LayerNorm)
add_layer_norm_function = applier(_AddLayerNorm)
