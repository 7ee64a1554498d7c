"""The gated linear unit of SiLU (Shazeer: arXiv:2002.05202)."""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up, with silu(x) = x / (1 + exp(-x)). Without `up`, the halves of gate's last dimension are both.

    Computed in float32 at least, returned in the dtype of gate and up together.
    """
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    dtype = torch.promote_types(gate.dtype, up.dtype)
    x = gate.to(torch.promote_types(dtype, torch.float32))
    return (x * torch.sigmoid(x) * up).to(dtype)
