"""A linear layer; GELU by torchweld."""

import torch

from torchweld import ops


class ModelNew(torch.nn.Module):
    def __init__(self, inputs: int, outputs: int, divisor: float) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(inputs, outputs)
        self.divisor = divisor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.gelu(self.linear(x) / self.divisor)
