"""The gated units by the binding's name of their activation: ours, the definition, and what torch has of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

from torchweld import ops, reference


class GatedForm(NamedTuple):
    """Two functions of gate and up, and torch's function of the gate alone."""

    ours: Callable[..., Tensor]
    definition: Callable[..., Tensor]
    activation: Callable[..., Tensor]

    def torchs(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.activation(gate) * up


GATED_FORMS = {
    "silu": GatedForm(ops.swiglu, reference.swiglu, functional.silu),
    "gelu": GatedForm(ops.geglu, reference.geglu, functional.gelu),
    "gelu_tanh": GatedForm(
        partial(ops.geglu, approximate="tanh"),
        partial(reference.geglu, approximate="tanh"),
        partial(functional.gelu, approximate="tanh"),
    ),
}
