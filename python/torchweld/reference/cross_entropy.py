"""Cross-entropy of class indices."""

from __future__ import annotations

import torch
from torch import Tensor

_STOCK = torch.nn.functional.cross_entropy  # a program may give its name to ours


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """-log softmax(input)[target] over the rows of `input` (N, C); computed in float32 at least, in input's dtype.

    With smoothing s the target is (1 - s) on its class and s / C on every class (Szegedy et al., arXiv:1512.00567).
    """
    logits = input.to(torch.promote_types(input.dtype, torch.float32))
    return _STOCK(
        logits,
        target,
        None if weight is None else weight.to(logits.dtype),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    ).to(input.dtype)
