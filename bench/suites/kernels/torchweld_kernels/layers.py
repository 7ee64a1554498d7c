"""Layers whose `forward` takes the place of that of a model's own layer. They have no members of their own."""

import torch
from torch import nn

from torchweld import ops


class RMSNorm(nn.Module):
    """Of transformers: `weight` and `variance_epsilon` are the model's."""

    weight: torch.Tensor
    variance_epsilon: float
    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


class LayerNorm(nn.Module):
    """Of torch.nn."""

    normalized_shape: tuple[int, ...]
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float
    has_backward = True
    can_torch_compile = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return ops.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class SiluAndMul(nn.Module):
    """silu of the first half of the columns, times the second."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return ops.swiglu(input)


class GeluTanh(nn.Module):
    """The tanh form of GELU."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return ops.gelu(input, approximate="tanh")
