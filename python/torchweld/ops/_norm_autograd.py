"""Gradients of layer_norm, rms_norm and their add_ forms: the ops of _norm.py, for autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchweld import reference
from torchweld.ops._norm import Norm, add_forward_op, backward_op, forward_op
from torchweld.ops._register import applier, differentiate, double_backward, recorder, wants_definition
from torchweld.reference.dropout import dropped


def _normalised(norm: Norm, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The norm by its definition, of rows as the kernels see them."""
    rows, shape = x.reshape(-1, norm.cols), (norm.cols,)
    weight = None if weight is None else weight.reshape(shape)
    if norm.centred:
        bias = None if bias is None else bias.reshape(shape)
        output = reference.layer_norm(rows, shape, weight, bias, norm.eps)
    else:
        output = reference.rms_norm(rows, shape, weight, norm.eps, zero_centered_weight=norm.weight_offset != 0)
    return output.reshape(x.shape)


def _differentiable(
    norm: Norm,
    inputs: Sequence[Tensor | None],
    doutput: Tensor,
    dsum: Tensor | None,
    mask: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of what was normalised, of weight and of bias, by the reference."""

    def outputs(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return _normalised(norm, x, weight, bias).to(doutput.dtype), x.clone()

    return double_backward(outputs, inputs, (doutput, dsum), mask)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Norm) -> Tensor:
        ctx.norm = norm
        output, stats = forward_op(input, weight, bias, norm)
        ctx.save_for_backward(input, weight, bias, stats)
        return output

    @staticmethod
    def backward(ctx: Any, doutput: Tensor) -> tuple[Tensor | None, ...]:
        return _LayerNorm.gradients(ctx, ctx.saved_tensors, doutput)

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Any, ...], doutput: Tensor) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad
        input, weight, bias, stats = saved
        if wants_definition(doutput):
            dx, dw, db = _differentiable(ctx.norm, (input, weight, bias), doutput, None, need[:3])
            return dx, dw, db, None
        mask = (need[0], False, need[1], need[2])
        dx, _, dw, db = backward_op(doutput, None, input, weight, bias, stats, None, mask, ctx.norm)
        return dx if need[0] else None, dw if need[1] else None, db if need[2] else None, None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        seed: Tensor | None,
        norm: Norm,
    ) -> tuple[Tensor, Tensor]:
        output, total, stats = add_forward_op(x, residual, weight, bias, seed, norm)
        # Only the sum is kept for the backward: x and residual can be freed.
        ctx.save_for_backward(total, weight, bias, stats, seed)
        ctx.norm, ctx.dtype = norm, x.dtype
        ctx.set_materialize_grads(False)
        return output, total

    @staticmethod
    def backward(ctx: Any, doutput: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, bias, stats, seed = ctx.saved_tensors
        norm = ctx.norm
        need_x, need_residual, need_weight, need_bias, _, _ = ctx.needs_input_grad
        differentiable = wants_definition(doutput, dsum)
        dr, dx, dw, db = dsum, None, None, None
        if doutput is None or differentiable:
            if doutput is not None:  # else only new_residual was used
                wanted = (need_x or need_residual, need_weight, need_bias)
                dr, dw, db = _differentiable(norm, (total, weight, bias), doutput, dsum, wanted)
            if need_x and dr is not None:
                dx = dropped(dr, norm.cols, norm.dropout_p, seed).to(ctx.dtype)
        else:
            # Where x and the residual have one gradient, it is computed once.
            same = seed is None and total.dtype == doutput.dtype
            mask = (need_residual or (same and need_x), need_x and not same, need_weight, need_bias)
            dr, dx, dw, db = backward_op(doutput, dsum, total, weight, bias, stats, seed, mask, norm)
            dx = dr if same else dx
        found = zip((dx, dr, dw, db), (need_x, need_residual, need_weight, need_bias), strict=True)
        return *(g if needed else None for g, needed in found), None, None


layer_norm_function = applier(_LayerNorm)
layer_norm_node = recorder(_LayerNorm, "layer_norm", "norm")
add_layer_norm_function = applier(_AddLayerNorm)


def _statistics(output: Any) -> Tensor:
    """What the node of `output` has saved in its fourth place."""
    stats: Tensor = output.grad_fn.saved_tensors[3]
    return stats


def _layer_norm_forward(*args: Any) -> tuple[Tensor, Tensor]:
    output = layer_norm_function(*args)
    return output, _statistics(output)


def _add_layer_norm_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    output, total = add_layer_norm_function(*args)
    return output, total, _statistics(output)


differentiate("layer_norm", layer_norm_function)
differentiate("layer_norm_forward", _layer_norm_forward)
differentiate("add_layer_norm_forward", _add_layer_norm_forward)
