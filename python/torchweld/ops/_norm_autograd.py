"""Gradients of layer_norm, rms_norm and their add_ forms: the ops of layer_norm_op.py, for autograd."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchweld import reference
from torchweld.ops._norm import add_forward_op, backward_op, forward_op
from torchweld.ops._register import applier, double_backward, wants_definition
from torchweld.reference.layer_norm import dropped


def _differentiable(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    doutput: Tensor,
    dsum: Tensor | None,
    mask: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of what was normalised, of weight and of bias, by the reference."""

    def outputs(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return function(x, weight, bias).to(doutput.dtype), x.clone()

    return double_backward(outputs, inputs, (doutput, dsum), mask)


def _function(shape: Sequence[int], eps: float, centred: bool, weight_offset: float) -> Callable[..., Tensor]:
    if centred:
        return lambda x, weight, bias: reference.layer_norm(x, shape, weight, bias, eps)
    return lambda x, weight, bias: reference.rms_norm(x, shape, weight, eps, zero_centered_weight=weight_offset != 0)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        norm: tuple[Sequence[int], float, bool, float],  # as one, for autograd looks at every argument
    ) -> Tensor:
        shape, eps, centred, weight_offset = ctx.norm = norm
        output, stats = forward_op(input, math.prod(shape), weight, bias, eps, centred, weight_offset)
        ctx.save_for_backward(input, weight, bias, stats)
        return output

    @staticmethod
    def backward(ctx: Any, doutput: Tensor) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad
        input, weight, bias, stats = ctx.saved_tensors  # once: a checkpoint gives them only once
        if wants_definition(doutput):
            dx, dw, db = _differentiable(_function(*ctx.norm), (input, weight, bias), doutput, None, need[:3])
            return dx, dw, db, None
        shape, _, _, weight_offset = ctx.norm
        dx, _, dw, db = backward_op(
            doutput,
            None,
            input,
            math.prod(shape),
            weight,
            bias,
            stats,
            (need[0], False, need[1], need[2]),
            weight_offset,
        )
        return dx if need[0] else None, dw if need[1] else None, db if need[2] else None, None


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
        dropout_p: float,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        output, total, stats = add_forward_op(
            x, residual, math.prod(shape), weight, bias, eps, centred, weight_offset, dropout_p, seed
        )
        # Only the sum is kept for the backward: x and residual can be freed.
        ctx.save_for_backward(total, weight, bias, stats, seed)
        ctx.norm, ctx.dropout_p, ctx.dtype = (shape, eps, centred, weight_offset), dropout_p, x.dtype
        ctx.set_materialize_grads(False)
        return output, total

    @staticmethod
    def backward(ctx: Any, doutput: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, bias, stats, seed = ctx.saved_tensors
        need, p, (shape, _, _, weight_offset) = ctx.needs_input_grad, ctx.dropout_p, ctx.norm
        cols = math.prod(shape)
        differentiable = wants_definition(doutput, dsum)
        dr, dx, dw, db = dsum, None, None, None
        if doutput is None or differentiable:
            if doutput is not None:  # else only new_residual was used
                wanted = (need[0] or need[1], need[3], need[4])
                dr, dw, db = _differentiable(_function(*ctx.norm), (total, weight, bias), doutput, dsum, wanted)
            if need[0] and dr is not None:
                dx = dropped(dr, cols, p, seed).to(ctx.dtype)
        else:
            # Where x and the residual have one gradient, it is computed once.
            same = seed is None and total.dtype == doutput.dtype
            mask = (need[1] or (same and need[0]), need[0] and not same, need[3], need[4])
            dr, dx, dw, db = backward_op(doutput, dsum, total, cols, weight, bias, stats, mask, weight_offset, p, seed)
            dx = dr if same else dx
        found = [g if needed else None for g, needed in zip((dx, dr, None, dw, db), need[:5], strict=True)]
        return *found, None, None, None, None, None


layer_norm_function = applier(_LayerNorm)
add_layer_norm_function = applier(_AddLayerNorm)
