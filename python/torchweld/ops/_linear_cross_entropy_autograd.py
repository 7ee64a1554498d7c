"""The autograd node of `torchweld.ops.linear_cross_entropy`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchweld import reference
from torchweld._torch import graph_is_kept
from torchweld.ops._linear_cross_entropy import NOTHING, LossOptions, Wanted, op
from torchweld.ops._register import applier, differentiate, double_backward, wants_definition


def reduced(losses: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """In float64: what a row's loss was rounded by may be the same for all."""
    if reduction == "none":
        return losses
    total = losses.sum(dtype=torch.float64)
    return total / (target != ignore_index).sum() if reduction == "mean" else total


class _LinearCrossEntropy(torch.autograd.Function):
    """A mean or a sum gives each row a gradient that is known beforehand, but for a factor: so all is done at once."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        options: LossOptions,
        reduction: str,
        wanted: Wanted,
    ) -> Tensor:
        ctx.scale = 1.0
        dloss = None
        if reduction != "none":
            dloss = input.new_ones(input.shape[0], dtype=torch.float32)
            if reduction == "mean":
                if input.dtype is torch.float16:
                    ctx.scale = _float16_scale(input.shape[0])
                dloss = dloss * ctx.scale / (target != options.ignore_index).sum()
        losses, *grads = op(input, weight, bias, target, options, dloss, NOTHING if dloss is None else wanted)
        ctx.save_for_backward(input, weight, bias, target, *grads)
        ctx.options, ctx.reduction, ctx.wanted = options, reduction, wanted
        return reduced(losses, target, options.ignore_index, reduction)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, target, *grads = ctx.saved_tensors
        if wants_definition(dloss):
            return (*_definition(ctx, input, weight, bias, target, dloss), *[None] * 4)
        if ctx.reduction == "none":
            grads = list(op(input, weight, bias, target, ctx.options, dloss, ctx.wanted)[1:])
        elif ctx.scale != 1.0 or not _is_last_use_of_all(dloss):
            grads = [g * (dloss / ctx.scale) for g in grads]
        if bias is not None:
            grads[2] = grads[2].to(bias.dtype)
        return (*[g if want else None for g, want in zip(grads, ctx.wanted, strict=True)], *[None] * 4)


def _float16_scale(rows: int) -> float:
    """Of gradients saved in float16: 1 / rows makes those of input subnormal before a loss scale arrives.

    About sqrt(rows): those of weight, sums over rows, then stay as far from overflow. A graph serves any number of
    rows, with the scale of 65,536.
    """
    if torch.compiler.is_compiling():
        return 256.0
    return 2.0 ** (rows.bit_length() // 2)


def _is_last_use_of_all(dloss: Tensor) -> bool:
    """Whether saved gradients may be given away as they are: no other backward follows, and the factor is 1."""
    if torch.compiler.is_compiling() or type(dloss) is not Tensor or dloss.device.type != "cpu":
        return False
    return float(dloss) == 1.0 and not graph_is_kept()


def _definition(
    ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, dloss: Tensor
) -> list[Tensor | None]:
    options: LossOptions = ctx.options

    def function(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        loss = reference.linear_cross_entropy(
            x.float(),
            w.float(),
            target,
            None if b is None else b.float(),
            ignore_index=options.ignore_index,
            label_smoothing=options.smoothing,
            reduction=ctx.reduction,
            softcap=options.softcap or None,
            z_loss=options.z_loss,
        )
        return loss.to(dloss.dtype)

    return double_backward(function, (input, weight, bias), (dloss,), ctx.wanted)


loss_of_rows = applier(_LinearCrossEntropy)


def _losses(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    options: LossOptions,
    dloss: Tensor | None,
    wanted: Wanted,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outputs of `op`, of which the loss of each row has gradients."""
    leaves = Wanted(*(t is not None and t.requires_grad for t in (input, weight, bias)))
    with torch.no_grad():
        _, *grads = op(input, weight, bias, target, options, dloss, NOTHING if dloss is None else wanted)
    dinput, dweight, dbias = grads
    return loss_of_rows(input, weight, bias, target, options, "none", leaves), dinput, dweight, dbias


differentiate("linear_cross_entropy", _losses)
