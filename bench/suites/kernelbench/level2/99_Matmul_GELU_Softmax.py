"""A linear layer and softmax; GELU by torchweld."""

import torch

from torchweld import ops


class ModelNew(torch.nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(inputs, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.gelu(self.linear(x)).softmax(1)
