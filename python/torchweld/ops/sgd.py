"""sgd_: one step of stochastic gradient descent as one op over lists of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from torchweld import reference
from torchweld.ops._arguments import flag, number
from torchweld.ops._optimizer import COMMON, Common, as_lists, run_step, step_fake, take_step
from torchweld.ops._register import register

# ---- Implementation


def _sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    masters: Sequence[Tensor],
    momentum: float,
    dampening: float,
    nesterov: bool,
    first_step: bool,
    *common: Any,
) -> None:
    lists = {"params": params, "grads": grads, "momentum_buffers": momentum_buffers, "masters": masters}
    own = {"momentum": momentum, "dampening": dampening, "nesterov": nesterov, "first_step": first_step}
    run_step("sgd_", lists, own, Common(*common), reference.sgd_)


_sgd_op = register(
    "sgd_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] momentum_buffers, Tensor(d!)[] masters,"
    f" float momentum, float dampening, bool nesterov, bool first_step, {COMMON}) -> ()",
    _sgd,
    step_fake,
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
        params, grads, lr, maximize, masters: as in `adamw_`, and so
        max_grad_norm, grad_norm, grad_scale, found_inf, zero_grads.
        momentum_buffers: as params, tensor for tensor: same shape; dtype of the parameter, or float32. Zeros before the
            first step. Ignored where `momentum` is 0.
        dampening: what is kept out of a gradient that enters the buffer, as a share of it.
        first_step: the buffers are new: dampening does not count.

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
    lists = as_lists(op, params=params, grads=grads, momentum_buffers=buffers, masters=masters)
    if momentum != 0 and len(lists["momentum_buffers"]) == 0 and len(lists["params"]) > 0:
        raise ValueError("[sgd_] momentum_buffers: expected one tensor for each of params (momentum > 0), but got none")
    own = {"momentum": momentum, "dampening": dampening, "nesterov": nesterov, "first_step": first_step}
    common = {
        "weight_decay": weight_decay,
        "maximize": maximize,
        "max_grad_norm": max_grad_norm,
        "grad_norm": grad_norm,
        "grad_scale": grad_scale,
        "found_inf": found_inf,
        "zero_grads": zero_grads,
    }
    return take_step(op, _sgd_op, reference.sgd_, lists, own, lr, common)
