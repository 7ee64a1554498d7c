"""The gated units as modules: without parameters, so they stand anywhere between two projections."""

from __future__ import annotations

import torch
from torch import Tensor

from torchweld import ops


class SwiGLU(torch.nn.Module):
    """silu(gate) * up, of two tensors or of the halves of one: see `torchweld.ops.swiglu`."""

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        return ops.swiglu(gate, up)


class GEGLU(torch.nn.Module):
    """gelu(gate) * up, of two tensors or of the halves of one: see `torchweld.ops.geglu`.

    Args:
        approximate: "none" or "tanh", as in `torch.nn.GELU`.
    """

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        self.approximate = approximate

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        return ops.geglu(gate, up, approximate=self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"
