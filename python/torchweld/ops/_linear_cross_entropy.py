"""The registered op behind `torchweld.ops.linear_cross_entropy`: its kernel, and its fake.

A module without a kernel of it, as the CUDA module is, gets torch's own products of a chunk of rows at a time, and
between them its kernels of cross_entropy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchweld import backend
from torchweld.ops._register import register, settle
from torchweld.reference.linear_cross_entropy import losses_of

_OP = "linear_cross_entropy"
_CHUNK_ELEMENTS = 1 << 26  # of the logits, 256 MB in float32


class LossOptions(NamedTuple):
    """The numbers of a loss. `softcap`: 0 for none."""

    ignore_index: int
    smoothing: float
    softcap: float
    z_loss: float


class Wanted(NamedTuple):
    """Which gradients a call is to make."""

    dinput: bool
    dweight: bool
    dbias: bool


NOTHING = Wanted(dinput=False, dweight=False, dbias=False)


def by_chunks(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    options: LossOptions,
    dloss: Tensor | None,
    wanted: Wanted,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The losses of all rows, float32, and the gradients of what is wanted; as the CPU's kernel has them."""
    rows, classes = input.shape[0], weight.shape[0]
    dtype, chunk = input.dtype, max(1, _CHUNK_ELEMENTS // classes)
    loss = input.new_empty(rows, dtype=torch.float32)
    dinput = torch.empty_like(input) if wanted.dinput else input.new_empty(0)
    dweight = weight.new_zeros(weight.shape, dtype=torch.float32) if wanted.dweight else weight.new_empty(0)
    biased = wanted.dbias and bias is not None
    dbias = input.new_zeros(classes, dtype=torch.float32) if biased else input.new_empty(0)
    for begin in range(0, rows, chunk):
        part = slice(begin, begin + chunk)
        # Rows without a target are not read: what they hold must reach no product.
        x = input[part].masked_fill((target[part] == options.ignore_index).unsqueeze(1), 0.0)
        logits = torch.mm(x, weight.t())
        if bias is not None:
            logits = logits.float() + bias
        by = _by_kernels if options.softcap == 0 and options.z_loss == 0 else _by_autograd
        loss[part], dlogits = by(logits, target[part], options, None if dloss is None else dloss[part])
        if dlogits is None:
            continue
        if biased:
            dbias += dlogits.sum(0)
        narrow = dlogits.to(dtype)
        del logits, dlogits
        if wanted.dinput:
            torch.mm(narrow, weight, out=dinput[part])
        if wanted.dweight:
            dweight += _product(narrow.t(), x)
    return loss, dinput, dweight.to(dtype), dbias


def _by_kernels(
    logits: Tensor, target: Tensor, options: LossOptions, dloss: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The losses of a chunk, and the gradient of its logits in the place of these, by the kernels of cross_entropy."""
    kernels = backend.module(logits.device)
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    stats = logits.new_empty((2, logits.shape[0]), dtype=torch.float32)
    kernels.cross_entropy_forward(
        logits=logits,
        target=target,
        ignore_index=options.ignore_index,
        smoothing=options.smoothing,
        loss=losses,
        stats=stats,
    )
    if dloss is None:
        return losses, None
    kernels.cross_entropy_backward(
        dloss=dloss,
        logits=logits,
        target=target,
        ignore_index=options.ignore_index,
        smoothing=options.smoothing,
        stats=stats,
        dlogits=logits,
    )
    return losses, logits


def _by_autograd(
    logits: Tensor, target: Tensor, options: LossOptions, dloss: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The same by torch's operators, for a softcap and a z loss, which the kernels of cross_entropy do not have."""
    with torch.enable_grad():
        logits = logits.float().detach().requires_grad_(dloss is not None)
        losses = losses_of(
            logits, target, options.ignore_index, options.smoothing, options.softcap or None, options.z_loss
        )
    return losses.detach(), None if dloss is None else torch.autograd.grad(losses, logits, dloss)[0]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """In float32, unrounded where torch can: its CUDA products of 16 bits have such an output."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


# ---- Implementation. The op returns the loss of each row and, for given gradients `dloss` of the losses, the gradients
# of input, weight and bias. A gradient that is not wanted is an empty tensor. The bindings check every target.


def _kernel(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    options: LossOptions,
    dloss: Tensor | None,
    wanted: Wanted,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, w, classes = (
        settle(t, f"[{_OP}] {name}") for name, t in (("input", input), ("weight", weight), ("target", target))
    )
    b = None if bias is None else settle(bias, f"[{_OP}] bias", torch.float32)
    if dloss is not None:
        dloss = settle(dloss, f"[{_OP}] gradient of the loss", torch.float32)
    kernels = backend.module(x.device)
    if not hasattr(kernels, _OP):
        return by_chunks(x, w, b, classes, options, dloss, wanted)
    loss = x.new_empty(x.shape[0], dtype=torch.float32)
    dinput, dweight, dbias = grads = [
        torch.empty_like(t) if want and t is not None else None for t, want in zip((x, w, b), wanted, strict=True)
    ]
    kernels.linear_cross_entropy(
        input=x,
        weight=w,
        bias=b,
        target=classes,
        options=options,
        dloss=dloss,
        loss=loss,
        dinput=dinput,
        dweight=dweight,
        dbias=dbias,
    )
    dinput, dweight, dbias = (x.new_empty(0) if g is None else g for g in grads)
    return loss, dinput, dweight, dbias


# ---- Fake


def _fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    options: LossOptions,
    dloss: Tensor | None,
    wanted: Wanted,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dinput, dweight = (
        torch.empty_like(t, memory_format=torch.contiguous_format) if want else t.new_empty(0)
        for t, want in ((input, wanted.dinput), (weight, wanted.dweight))
    )
    biased = wanted.dbias and bias is not None
    dbias = input.new_empty(weight.shape[0], dtype=torch.float32) if biased else input.new_empty(0)
    return input.new_empty(input.shape[0], dtype=torch.float32), dinput, dweight, dbias


op = register(
    "linear_cross_entropy(Tensor input, Tensor weight, Tensor? bias, Tensor target, LossOptions options, Tensor? dloss,"
    " Wanted wanted)"
    " -> (Tensor loss, Tensor dinput, Tensor dweight, Tensor dbias)",
    _kernel,
    _fake,
    LossOptions,
    Wanted,
)
