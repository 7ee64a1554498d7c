"""Layers that the models share."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """Dropout, while training."""

    def __init__(self, p: float, ops: ModuleType) -> None:
        super().__init__(p)
        self.dropout = ops.dropout

    def forward(self, input: Tensor) -> Tensor:
        """(...) -> (...)."""
        return self.dropout(input, self.p, self.training)


def split_heads(x: Tensor, kinds: int, size: int) -> Tensor:
    """What a linear layer makes for `kinds` of heads at once: (..., kinds * H * size) -> (..., kinds, H, size).

    A layer whose heads are spread over processes gives them so itself.
    """
    return x if x.shape[-1] == size else x.unflatten(-1, (kinds, -1, size))


class Norm(nn.Module):
    """Layer norm over the last dimension, with the residual add in front of it."""

    def __init__(self, width: int, eps: float, ops: ModuleType) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps
        self.layer_norm, self.add_layer_norm = ops.layer_norm, ops.add_layer_norm

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (..., C): what is added to the stream `residual`, or its beginning. Returns (normed, the new stream)."""
        args = self.weight.shape, self.weight, self.bias, self.eps
        if residual is None:
            return self.layer_norm(x, *args), x
        # Under autocast a layer gives bfloat16; the stream stays float32, where small contributions are not lost.
        return self.add_layer_norm(x.to(residual.dtype), residual, *args)
