"""Cross-entropy of class indices."""

from __future__ import annotations

import torch
from torch import Tensor

_STOCK = torch.nn.functional.cross_entropy  # a program may replace it by ours


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """-log softmax(input)[target] over the rows of `input` (N, C), or of its dimension 1.

    Computed in float32 at least. The result has torch's promoted dtype of input, weight, and target if it is class
    probabilities. With smoothing s the target is (1 - s) on its class and s / C on every class (Szegedy et al.,
    arXiv:1512.00567).
    """
    soft = target.is_floating_point()
    dtype = torch.promote_types(input.dtype, target.dtype) if soft else input.dtype
    if weight is not None:
        dtype = torch.promote_types(dtype, weight.dtype)
    logits = input.to(torch.promote_types(dtype, torch.float32))
    return _STOCK(
        logits,
        target.to(logits.dtype) if soft else target,
        None if weight is None else weight.to(logits.dtype),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    ).to(dtype)
