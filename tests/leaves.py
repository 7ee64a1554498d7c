"""What tests read from the leaves of a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def gradient(leaf: Tensor) -> Tensor:
    """The gradient that a backward has left in `leaf`, which must have one."""
    assert leaf.grad is not None
    return leaf.grad


def penalty(function: Callable[..., Any], leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradients of a gradient penalty: second derivatives of `function`, which returns (output, lse)."""
    out, lse = function(*leaves)
    grads = torch.autograd.grad(out.square().sum() + lse.sum(), leaves, create_graph=True)
    return torch.autograd.grad(torch.stack([g.square().sum() for g in grads]).sum(), leaves)
