"""The gated linear unit of GELU (Shazeer: arXiv:2002.05202)."""

from __future__ import annotations

import torch
from torch import Tensor

from torchweld.reference.gelu import gelu


def geglu(gate: Tensor, up: Tensor | None = None, *, approximate: str = "none") -> Tensor:
    """gelu(gate) * up. Without `up`, the halves of gate's last dimension are both.

    Computed in float32 at least, returned in the dtype of gate and up together.
    """
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    dtype = torch.promote_types(gate.dtype, up.dtype)
    x = gate.to(torch.promote_types(dtype, torch.float32))
    return (gelu(x, approximate) * up).to(dtype)
