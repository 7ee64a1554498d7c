"""GELU by torchweld."""

import torch

from torchweld import ops


class ModelNew(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.gelu(x)
