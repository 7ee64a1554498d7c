"""What the definitions of the optimizers share: the norm of the gradients, scaling, clipping, rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchweld.reference.philox import philox


def real(t: Tensor) -> Tensor:
    """A complex tensor as a real tensor with twice the elements."""
    return torch.view_as_real(t) if t.is_complex() else t


def grad_norm(grads: Sequence[Tensor], *, grad_scale: Tensor | None = None) -> Tensor:
    """sqrt(sum of the squares of all elements of all gradients) / |grad_scale|, a scalar in float32 at least."""
    compute = torch.float64 if any(real(g).dtype == torch.float64 for g in grads) else torch.float32
    norms = [torch.linalg.vector_norm(real(g), dtype=compute) for g in grads]
    norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), dtype=compute)
    return norm if grad_scale is None else norm / grad_scale.reshape(()).abs().to(compute)


def clip_factor(max_grad_norm: float | None, norm: Tensor | None) -> Tensor | float:
    """The factor by which `torch.nn.utils.clip_grad_norm_` multiplies the gradients."""
    if max_grad_norm is None or norm is None:
        return 1.0
    return (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)


def overflowed(found_inf: Tensor | None, grads: Sequence[Tensor], zero_grads: bool) -> bool:
    """Whether `found_inf` is set: the step then changes nothing. With `zero_grads` the gradients still become zero."""
    if found_inf is None or found_inf.item() == 0:
        return False
    if zero_grads:
        for grad in grads:
            grad.zero_()
    return True


def take_gradient(
    grad: Tensor, compute: torch.dtype, grad_scale: Tensor | None, clip: Tensor | float, maximize: bool, zero: bool
) -> Tensor:
    """The gradient of the step. The stored gradient becomes 0, or is divided by grad_scale but not clipped."""
    g = real(grad).to(compute)
    if grad_scale is not None:
        g = g / grad_scale.reshape(()).to(compute)
        real(grad).copy_(g)
    g = g * clip
    if zero:
        grad.zero_()
    return -g if maximize else g


def round_stochastically(x: Tensor, seed: int, row: int) -> Tensor:
    """float32 x rounded to bfloat16, up or down with probabilities that make x the mean. Infinities and NaN stay.

    16 random bits are added to the 16 bits that are cut off; the carry rounds up. Element i, in the order of memory,
    takes half i % 2 (the low one first) of word i / 2 % 4 of philox(seed, row, i / 8).
    """
    blocks = torch.arange((x.numel() + 7) // 8, device=x.device)
    words = philox(torch.tensor(seed, device=x.device), torch.tensor(row, device=x.device), blocks).flatten()
    halves = torch.stack((words & 0xFFFF, words >> 16), -1).flatten()[: x.numel()]
    random = torch.empty_like(x, dtype=torch.int32, memory_format=torch.preserve_format)
    random.as_strided((x.numel(),), (1,)).copy_(halves)
    return _carried(x, random)


def _carried(x: Tensor, random: Tensor | int) -> Tensor:
    bits = x.view(torch.int32) + random & -0x10000
    return torch.where(x.isfinite(), bits.view(torch.float32), x).to(torch.bfloat16)


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def newest(master: Tensor, param: Tensor, at_random: bool) -> Tensor:
    """The values that a step starts from: the master, or the parameter where it is not a rounding of the master.

    Other code has written to such a parameter. The comparison is of bits. A step that rounds at random leaves one of
    the master's two neighbours.
    """
    if at_random and param.dtype == torch.bfloat16:
        roundings = [_carried(master, 0), _carried(master, 0xFFFF)]
    else:
        roundings = [master.to(param.dtype)]
    bits = _BITS[param.element_size()]
    ours = torch.zeros_like(param, dtype=torch.bool)
    for rounding in roundings:
        ours |= rounding.view(bits) == param.view(bits)
    return torch.where(ours, master, param.to(master.dtype))
