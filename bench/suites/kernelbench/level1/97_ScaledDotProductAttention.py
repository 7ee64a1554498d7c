"""Attention by torchweld."""

import torch

from torchweld import ops


class ModelNew(torch.nn.Module):
    def forward(self, Q: torch.Tensor, K: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
        return ops.scaled_dot_product_attention(Q, K, V)
