"""Stochastic gradient descent with momentum (Polyak 1964) or Nesterov's (Sutskever et al., ICML 2013)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchweld.reference.optimizer import clip_factor, newest, overflowed, real, take_gradient
from torchweld.reference.optimizer import grad_norm as norm_of


def sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
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
    masters: Sequence[Tensor] = (),
    zero_grads: bool = False,
) -> Tensor | None:
    """One step of every parameter, in place: the maths of `torch.optim.SGD`, and all else as in `adamw_`.

    The buffers start as zeros. With `first_step` dampening does not count, for the buffers are new.
    """
    if max_grad_norm is not None and grad_norm is None:
        grad_norm = norm_of(grads, grad_scale=grad_scale)
    if overflowed(found_inf, grads, zero_grads):
        return grad_norm
    clip = clip_factor(max_grad_norm, grad_norm)

    for i, param in enumerate(params):
        stepped = real(masters[i] if masters else param)
        start = newest(stepped, real(param), at_random=False) if masters else stepped
        compute = torch.promote_types(stepped.dtype, torch.float32)
        p = start.to(compute)
        g = take_gradient(grads[i], compute, grad_scale, clip, maximize, zero_grads)
        if weight_decay != 0:
            g = g + weight_decay * p
        if momentum != 0:
            buffer = real(momentum_buffers[i])
            b = momentum * buffer.to(compute) + (1.0 if first_step else 1 - dampening) * g
            buffer.copy_(b)
            g = g + momentum * b if nesterov else b
        p = p - lr * g
        stepped.copy_(p)
        if masters:
            real(param).copy_(p)
    return grad_norm
