"""AdamW (Loshchilov, Hutter: arXiv:1711.05101), Adam (Kingma, Ba: arXiv:1412.6980) and AMSGrad (arXiv:1904.09237)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t) if t.is_complex() else t


def grad_norm(grads: Sequence[Tensor], *, grad_scale: Tensor | None = None) -> Tensor:
    """sqrt(sum of the squares of all elements of all gradients) / |grad_scale|, a scalar in float32 at least."""
    compute = torch.float64 if any(_real(g).dtype == torch.float64 for g in grads) else torch.float32
    norms = [torch.linalg.vector_norm(_real(g), dtype=compute) for g in grads]
    norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), dtype=compute)
    return norm if grad_scale is None else norm / grad_scale.reshape(()).abs().to(compute)


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
) -> Tensor | None:
    """One step of every parameter, in place; computed in float32 at least, rounded to each tensor's dtype where stored.

    The maths of `torch.optim.AdamW` (decoupled weight decay) and `torch.optim.Adam` (decay added to the gradient),
    after dividing the gradients by `grad_scale` (they are stored so) and clipping them by their global norm as
    `torch.nn.utils.clip_grad_norm_` does (they are not stored so). Where `found_inf` is not zero nothing moves.

    Returns the norm before clipping: `grad_norm` if given, else that of `grads` if `max_grad_norm` is; else None.
    """
    if max_grad_norm is not None and grad_norm is None:
        grad_norm = _grad_norm(grads, grad_scale=grad_scale)
    if found_inf is not None and found_inf.item() != 0:
        return grad_norm
    clip: Tensor | float = 1.0
    if max_grad_norm is not None and grad_norm is not None:
        clip = (max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)

    for i, param in enumerate(params):
        steps[i].add_(1)
        step = steps[i].item()
        stored = [_real(t) for t in (param, exp_avgs[i], exp_avg_sqs[i])]
        compute = torch.promote_types(stored[0].dtype, torch.float32)
        p, m, v = (t.to(compute) for t in stored)

        g = _real(grads[i]).to(compute)
        if grad_scale is not None:
            g = g / grad_scale.reshape(()).to(compute)
            _real(grads[i]).copy_(g)
        g = g * clip
        g = -g if maximize else g
        if weight_decay != 0:
            if decoupled:
                p = p * (1 - lr * weight_decay)
            else:
                g = g + weight_decay * p

        m = m + (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * g * g
        largest = v
        if amsgrad:
            largest = torch.maximum(_real(max_exp_avg_sqs[i]).to(compute), v)
            _real(max_exp_avg_sqs[i]).copy_(largest)
        step_size = lr / (1 - beta1**step)
        p = p - step_size * m / (largest.sqrt() / (1 - beta2**step) ** 0.5 + eps)

        for t, value in zip(stored, (p, m, v), strict=True):
            t.copy_(value)
    return grad_norm


_grad_norm = grad_norm  # adamw_ has an argument of that name
