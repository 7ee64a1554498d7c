"""linear_cross_entropy by torch's own products, a chunk of rows at a time: for devices without a kernel of it."""

from __future__ import annotations

import torch
from torch import Tensor

from torchweld.reference.linear_cross_entropy import losses_of

_CHUNK_ELEMENTS = 1 << 26  # of the logits, 256 MB in float32


def by_chunks(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    smoothing: float,
    softcap: float,
    z_loss: float,
    dloss: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The losses of all rows, float32, and the gradients of what is wanted; as the kernels have them."""
    rows, classes = input.shape[0], weight.shape[0]
    dtype, chunk = input.dtype, max(1, _CHUNK_ELEMENTS // classes)
    loss = input.new_empty(rows, dtype=torch.float32)
    dinput = torch.empty_like(input) if wanted[0] else input.new_empty(0)
    dweight = weight.new_zeros(weight.shape, dtype=torch.float32) if wanted[1] else weight.new_empty(0)
    dbias = input.new_zeros(classes, dtype=torch.float32) if wanted[2] and bias is not None else input.new_empty(0)
    for begin in range(0, rows, chunk):
        part = slice(begin, begin + chunk)
        # Rows without a target are not read: what they hold must reach no product.
        x = input[part].masked_fill((target[part] == ignore_index).unsqueeze(1), 0.0)
        with torch.enable_grad():
            logits = torch.mm(x.detach(), weight.detach().t()).float()
            if bias is not None:
                logits = logits + bias.detach()
            logits.requires_grad_(dloss is not None)
            losses = losses_of(logits, target[part], ignore_index, smoothing, softcap or None, z_loss)
        loss[part] = losses.detach()
        if dloss is None:
            continue
        dlogits = torch.autograd.grad(losses, logits, dloss[part])[0]
        if wanted[2] and bias is not None:
            dbias += dlogits.sum(0)
        narrow = dlogits.to(dtype)
        del logits, losses, dlogits
        if wanted[0]:
            torch.mm(narrow, weight, out=dinput[part])
        if wanted[1]:
            dweight += _product(narrow.t(), x)
    return loss, dinput, dweight.to(dtype), dbias


def _product(a: Tensor, b: Tensor) -> Tensor:
    """In float32, unrounded where torch can: its CUDA products of 16 bits have such an output."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)
