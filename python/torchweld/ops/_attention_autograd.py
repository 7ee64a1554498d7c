"""Gradients of attention by the ops of _attention.py or by the definition, and the choice of the backend for a call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchweld import backend, reference
from torchweld.ops._arguments import defined
from torchweld.ops._attention import (
    ALIGNMENTS,
    DIFFERENTIABLE,
    Modifiers,
    Options,
    backward_op,
    forward_op,
    heads_like,
    inference_op,
    refusal,
)
from torchweld.ops._register import (
    applier,
    compiling,
    differentiate,
    double_backward,
    recorder,
    wants_definition,
    wants_grad,
)


def _on_reference(
    query: Tensor, key: Tensor, value: Tensor, modifiers: Modifiers, options: Options
) -> tuple[Tensor, ...]:
    """(output, lse) by the definition."""
    left, right = options.left, options.right
    result = reference.attention(
        query,
        key,
        value,
        window=(None if left < 0 else left, None if right < 0 else right),
        softcap=options.softcap,
        dropout_p=options.dropout_p,
        scale=options.scale,
        causal_align=ALIGNMENTS[options.bottom_right],
        return_lse=True,
        **modifiers._asdict(),
    )
    assert isinstance(result, tuple)
    return result


class Numbers(NamedTuple):
    """All numbers of a call, which autograd sees as one argument: each would cost a call as much as a tensor."""

    options: Options
    deterministic: bool
    return_lse: bool


class _Attention(torch.autograd.Function):
    heads_like = staticmethod(heads_like)

    @staticmethod
    def forward(
        ctx: Any, numbers: Numbers, query: Tensor, key: Tensor, value: Tensor, *modifiers: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        # Autograd sees every tensor as an argument of its own, the fields of Modifiers up to the last that is given.
        ctx.options, ctx.deterministic, return_lse = numbers.options, numbers.deterministic, numbers.return_lse
        rows = 3 if return_lse else 2
        output, wide, statistics = forward_op(query, key, value, Modifiers(*modifiers), ctx.options, rows)
        saved = output if wide is None or wide.dim() == 1 else wide
        ctx.save_for_backward(saved, statistics, query, key, value, *modifiers)
        ctx.set_materialize_grads(False)
        return (output, statistics[2]) if return_lse else output

    @staticmethod
    def backward(ctx: Any, doutput: Tensor | None, dlse: Tensor | None = None) -> tuple[Tensor | None, ...]:
        return _Attention.gradients(ctx, ctx.saved_tensors, doutput, dlse)

    @staticmethod
    def gradients(
        ctx: Any, saved: tuple[Any, ...], doutput: Tensor | None, dlse: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        output, statistics, query, key, value, *others = saved
        modifiers = Modifiers(*others)
        # DIFFERENTIABLE names the first six arguments; behind them stand only integers.
        mask = (*ctx.needs_input_grad[1:], False, False, False)[: len(DIFFERENTIABLE)]
        if wants_definition(doutput, dlse):

            def function(query: Tensor, key: Tensor, value: Tensor, *leaves: Any) -> tuple[Tensor, ...]:
                bias, alibi_slopes, sinks = leaves
                here = modifiers._replace(bias=bias, alibi_slopes=alibi_slopes, sinks=sinks)
                return _on_reference(query, key, value, here, ctx.options)

            inputs = (query, key, value, modifiers.bias, modifiers.alibi_slopes, modifiers.sinks)
            grads = double_backward(function, inputs, (doutput, dlse), mask)
        else:
            if doutput is None:  # only lse was used
                doutput = torch.zeros_like(output, dtype=query.dtype)
            grads = backward_op(
                doutput, dlse, output, statistics, query, key, value, modifiers, ctx.options, mask, ctx.deterministic
            )
        found = [g if wanted else None for g, wanted in zip(grads, mask, strict=True)]
        return None, *(*found, None, None, None)[: 3 + len(others)]


_attention_with_grad = applier(_Attention)
attention_node = recorder(_Attention, "attention", "options", "deterministic")
_UP_TO_BIAS = Modifiers._fields.index("bias") + 1  # so many modifiers the node takes


def attend_with_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    modifiers: Modifiers,
    options: Options,
    deterministic: bool = True,
    return_lse: bool = False,
) -> Any:
    """output, or (output, lse), of arguments that the kernels take, recorded by autograd."""
    given = len(modifiers)
    while given > 0 and modifiers[given - 1] is None:
        given -= 1
    numbers = Numbers(options, deterministic, return_lse)
    if given <= _UP_TO_BIAS and not return_lse and not compiling():
        return attention_node(numbers, query, key, value, modifiers.bias)
    return _attention_with_grad(numbers, query, key, value, *modifiers[:given])


def _attention(query: Tensor, key: Tensor, value: Tensor, modifiers: Modifiers, options: Options) -> Any:
    return attend_with_grad(query, key, value, modifiers, options)


def _attention_forward(
    query: Tensor, key: Tensor, value: Tensor, modifiers: Modifiers, options: Options, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, wide output and statistics; lse, their last row if there are 1 or 3, has a gradient too."""
    numbers = Numbers(options, deterministic=True, return_lse=rows != 2)
    found = _attention_with_grad(numbers, query, key, value, *modifiers)
    output, lse = found if rows != 2 else (found, None)
    saved, statistics = output.grad_fn.saved_tensors[:2]
    wide = saved if saved.dtype is not output.dtype else query.new_empty(0)
    if lse is not None:
        statistics = lse.unsqueeze(0) if rows == 1 else torch.cat((statistics[:2], lse.unsqueeze(0)))
    return output, wide, statistics


differentiate("attention", _attention)
differentiate("attention_forward", _attention_forward)


def attend(
    op: str,
    return_lse: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    modifiers: Modifiers,
    options: Options,
    deterministic: bool = True,
) -> Any:
    """output, or (output, lse), of checked arguments by the backend that `choose` names."""
    if backend.choose(op, query.device, refusal(query, value)) == "reference":
        tensors = {"query": query, "key": key, "value": value, **modifiers._asdict()}
        both = defined(_on_reference, op, tensors, query, key, value, modifiers, options)
        return both if return_lse else both[0]
    if wants_grad(query, key, value, modifiers.bias, modifiers.alibi_slopes, modifiers.sinks):
        return attend_with_grad(query, key, value, modifiers, options, deterministic, return_lse)
    if return_lse:
        output, _, statistics = forward_op(query, key, value, modifiers, options, 1)
        return output, statistics[0]
    return inference_op(query, key, value, modifiers, options)
