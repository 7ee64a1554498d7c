"""swiglu: silu(gate) * up, fused forward and backward."""

from __future__ import annotations

from torch import Tensor

from torchweld.ops._gated import gated


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up in one pass (Shazeer: arXiv:2002.05202). Nothing but gate and up is kept for the backward.

    Args:
        gate: any shape; the kernels take float32, bfloat16 and float16 (others run on the reference).
        up: of gate's shape and device. None: gate is packed, (..., 2 n), the gate's n columns in front of up's.

    Returns:
        A tensor of up's shape, (..., n). Of inputs of two dtypes, in the one that torch promotes them to.

    Raises:
        RuntimeError: up has another shape or device than gate; a packed gate has no even last dimension.
        TypeError: gate or up is not floating point of 16 bits or more, or no dense tensor.
    """
    return gated(swiglu, gate, up, "silu")
