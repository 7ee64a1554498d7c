"""Cross-entropy of a linear layer's output."""

from __future__ import annotations

import torch
from torch import Tensor

_STOCK = torch.nn.functional.cross_entropy  # a program may give its name to ours
_LINEAR = torch.nn.functional.linear


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    z_loss: float = 0.0,
    shift: bool = False,
) -> Tensor:
    """-log softmax(logits)[target] + z_loss * log(sum(exp(logits)))^2 over the rows of `input` (*, H).

    logits = input @ weight^T + bias (*, V), and with a softcap c c * tanh(logits / c) (Gemma 2, arXiv:2408.00118); the
    z loss is that of PaLM (arXiv:2204.02311), smoothing that of `cross_entropy`. `shift` takes the classes of position
    t from position t + 1 of target: a causal language model's own tokens. Rows without a target are not read: they
    count nowhere, whatever they hold. Computed in float32 at least; the result has the dtype that input, weight and
    bias are promoted to.
    """
    if shift:
        input, target = input[..., :-1, :], target[..., 1:]
    dtype = torch.promote_types(input.dtype, weight.dtype)
    if bias is not None:
        dtype = torch.promote_types(dtype, bias.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    counts = target != ignore_index
    rows = torch.where(counts.unsqueeze(-1), input.to(wide), 0.0)
    logits = _LINEAR(rows, weight.to(wide), None if bias is None else bias.to(wide))
    losses = losses_of(logits, target, ignore_index, label_smoothing, softcap, z_loss)
    if reduction == "mean":
        losses = losses.sum() / counts.sum()
    elif reduction == "sum":
        losses = losses.sum()
    return losses.to(dtype)


def losses_of(
    logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float, softcap: float | None, z_loss: float
) -> Tensor:
    """What comes after the product: from logits (*, V) to the loss of each row (*), 0 where there is no target."""
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    rows, classes = logits.reshape(-1, logits.shape[-1]), target.reshape(-1)
    losses = _STOCK(rows, classes, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing)
    if z_loss:
        squares = rows.logsumexp(-1).square()
        losses = losses + z_loss * torch.where(classes != ignore_index, squares, 0.0)
    return losses.reshape(target.shape)
