"""What tests read from the leaves of a graph."""

from __future__ import annotations

from torch import Tensor


def gradient(leaf: Tensor) -> Tensor:
    """The gradient that a backward has left in `leaf`, which must have one."""
    assert leaf.grad is not None
    return leaf.grad
