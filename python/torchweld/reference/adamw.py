"""AdamW (Loshchilov, Hutter: arXiv:1711.05101), Adam (Kingma, Ba: arXiv:1412.6980) and AMSGrad (arXiv:1904.09237)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchweld.reference.optimizer import clip_factor, newest, overflowed, real, round_stochastically, take_gradient
from torchweld.reference.optimizer import grad_norm as norm_of


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool = True,
    amsgrad: bool = False,
    maximize: bool = False,
    max_grad_norm: float | None = None,
    grad_norm: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    masters: Sequence[Tensor] = (),
    rounding_seed: int | None = None,
    zero_grads: bool = False,
) -> Tensor | None:
    """One step of every parameter, in place, computed in float32 at least. A stored tensor is rounded to its dtype.

    The maths is that of `torch.optim.AdamW` (decoupled weight decay) and `torch.optim.Adam` (decay added to the
    gradient). The gradients are first divided by `grad_scale` and stored so, then clipped by their global norm as by
    `torch.nn.utils.clip_grad_norm_`, but not stored so. If `found_inf` is not zero, nothing changes. With `masters` the
    step updates the masters, and the parameters become their roundings. Where an element of a parameter is not the
    rounding of its master, other code has written it, and the step starts from the parameter. With a `rounding_seed`
    bfloat16 parameters are rounded stochastically; parameter i takes row 2**32 * step + i of the random bits.

    Returns the norm before clipping: `grad_norm` if given, else the norm of `grads` if `max_grad_norm` is given, else
    None.
    """
    if max_grad_norm is not None and grad_norm is None:
        grad_norm = norm_of(grads, grad_scale=grad_scale)
    if overflowed(found_inf, grads, zero_grads):
        return grad_norm
    clip = clip_factor(max_grad_norm, grad_norm)

    for i, param in enumerate(params):
        steps[i].add_(1)
        step = steps[i].item()
        stepped = real(masters[i] if masters else param)
        start = newest(stepped, real(param), rounding_seed is not None) if masters else stepped
        compute = torch.promote_types(stepped.dtype, torch.float32)
        p, m, v = (t.to(compute) for t in (start, real(exp_avgs[i]), real(exp_avg_sqs[i])))

        g = take_gradient(grads[i], compute, grad_scale, clip, maximize, zero_grads)
        if weight_decay != 0:
            if decoupled:
                p = p * (1 - lr * weight_decay)
            else:
                g = g + weight_decay * p

        m = m.lerp(g, 1 - beta1)
        v = beta2 * v + (1 - beta2) * g * g
        largest = v
        if amsgrad:
            largest = torch.maximum(real(max_exp_avg_sqs[i]).to(compute), v)
            real(max_exp_avg_sqs[i]).copy_(largest)
        step_size = lr / (1 - beta1**step)
        p = p - step_size * m / (largest.sqrt() / (1 - beta2**step) ** 0.5 + eps)

        real(exp_avgs[i]).copy_(m)
        real(exp_avg_sqs[i]).copy_(v)
        stepped.copy_(p)
        if rounding_seed is not None and param.dtype == torch.bfloat16:
            param.copy_(round_stochastically(p, rounding_seed, (int(step) << 32) + i))
        elif masters:
            real(param).copy_(p)
    return grad_norm
