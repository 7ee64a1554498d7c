"""sgd_: one step of stochastic gradient descent as one op over lists of tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from torchweld import reference
from torchweld.ops._arguments import flag, number
from torchweld.ops._optimizer import Step, Tensors, as_lists, checked_step, run_step, step_fake, take_step
from torchweld.ops._register import register


class SgdLists(NamedTuple):
    """The lists of one step, all in the order of the parameters. A list that does not apply is empty."""

    params: Tensors
    grads: Tensors
    momentum_buffers: Tensors
    masters: Tensors


class SgdOptions(NamedTuple):
    """The numbers of the update rule."""

    momentum: float
    dampening: float
    nesterov: bool
    first_step: bool


# ---- Implementation


def _sgd(lists: SgdLists, options: SgdOptions, step: Step) -> None:
    run_step("sgd_", lists, options, step, reference.sgd_)


_sgd_op = register(
    "sgd_(SgdLists lists, SgdOptions options, Step step) -> ()", _sgd, step_fake, SgdLists, SgdOptions, Step
)

# ---- Public


def sgd_(
    params: Iterable[Tensor],
    grads: Iterable[Tensor],
    momentum_buffers: Iterable[Tensor],
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first_step: bool = False,
    max_grad_norm: float | None = None,
    grad_norm: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    masters: Iterable[Tensor] = (),
    zero_grads: bool = False,
) -> Tensor | None:
    """One step of SGD over lists of tensors, in place and in one pass over their memory.

    The maths is in `torchweld.reference.sgd_`. Works in float32. Takes no part in autograd.

    Args:
        params, grads, lr, maximize, masters: as in `adamw_`.
        max_grad_norm, grad_norm, grad_scale, found_inf, zero_grads: as in `adamw_`.
        momentum_buffers: one tensor for each of params, of its shape, in its dtype or float32. Zeros before the first
            step. Ignored where `momentum` is 0.
        dampening: the share of a gradient that does not enter its buffer.
        first_step: the buffers are new, and `dampening` does not count.

    Returns:
        The norm before clipping (a float32 scalar) if `max_grad_norm` or `grad_norm` is given, else None.

    Raises:
        ValueError: lists of different lengths; a device, dtype or shape that does not fit, naming the tensor; a
            hyper-parameter out of range. Nothing has been changed then.
        TypeError: an argument that is no list of tensors, a sparse or nested tensor in one; a scalar that is neither a
            number nor a tensor.
        RuntimeError: a tensor requires grad, outside of `torch.no_grad()`.
    """
    op = "sgd_"
    momentum, dampening = number(op, "momentum", momentum), number(op, "dampening", dampening)
    if not momentum >= 0:
        raise ValueError(f"[sgd_] momentum: expected momentum >= 0, but got {momentum}")
    nesterov, first_step = flag(op, "nesterov", nesterov), flag(op, "first_step", first_step)
    buffers = momentum_buffers if momentum != 0 else []
    lists = SgdLists(**as_lists(op, params=params, grads=grads, momentum_buffers=buffers, masters=masters))
    if momentum != 0 and len(lists.momentum_buffers) == 0 and len(lists.params) > 0:
        raise ValueError("[sgd_] momentum_buffers: expected one tensor for each of params (momentum > 0), but got none")
    step = checked_step(
        op,
        lr=lr,
        weight_decay=weight_decay,
        maximize=maximize,
        max_grad_norm=max_grad_norm,
        grad_norm=grad_norm,
        grad_scale=grad_scale,
        found_inf=found_inf,
        zero_grads=zero_grads,
    )
    return take_step(op, _sgd_op, reference.sgd_, lists, SgdOptions(momentum, dampening, nesterov, first_step), step)
