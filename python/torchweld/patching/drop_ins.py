"""The drop-ins, by the class of module that they replace."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from torchweld import ops
from torchweld._torch import has_hooks
from torchweld.nn.twins import TWINS
from torchweld.patching.attention import redirected_methods
from torchweld.patching.subclasses import Class, makers, subclass

_NEEDS: dict[Any, tuple[str, ...]] = {
    torch.nn.LayerNorm: ("norms",),
    torch.nn.RMSNorm: ("norms",),
    torch.nn.MultiheadAttention: ("attention",),
    torch.nn.Dropout: ("dropout",),
}


@dataclass(frozen=True)
class DropIn:
    """`needs`: the kinds of swap that it is part of; `make`: returns the class; `now`: what serves it.

    `why_not`: the reason why a module of the class is left; None if it is swapped.
    """

    needs: tuple[str, ...]
    make: Callable[[], Class]
    now: str
    why_not: Callable[[torch.nn.Module], str | None] = lambda _: None


def _gelu(self: Any, input: torch.Tensor) -> torch.Tensor:
    # Forward alone torch's exact form is as fast in float32.
    forward_alone = self.approximate == "none" and not (input.requires_grad and torch.is_grad_enabled())
    if input.is_nested or (forward_alone and input.dtype is torch.float32):
        return torch.nn.functional.gelu(input, approximate=self.approximate)
    return ops.gelu(input, self.approximate)


def _why_not(module: Any) -> str | None:
    """Why a module that has a twin is left."""
    if type(module) is not torch.nn.Dropout:
        return None
    if module.inplace:
        return "it works in place"
    return "it has hooks" if has_hooks(module) else None


def hugging_face() -> Any:
    """integrations.hugging_face; None if transformers is not imported, for no model can then be of it."""
    if "transformers.modeling_utils" not in sys.modules:
        return None
    from torchweld.integrations import hugging_face  # noqa: PLC0415

    return hugging_face


def _of_hugging_face(cls: Any) -> DropIn | None:
    if "transformers.modeling_utils" not in sys.modules:
        return None
    from torchweld.integrations.hugging_face_layers import recognise  # noqa: PLC0415

    if (known := recognise(cls)) is None:
        return None
    return DropIn((known.kind,), partial(subclass, cls, known.methods), known.now, known.why_not)


def find(cls: Any) -> DropIn | None:
    """The drop-in for modules of exactly this class, or None."""
    if twin := TWINS.get(cls):
        needs = _NEEDS.get(cls, ("norms", "attention"))
        return DropIn(needs, lambda: twin, f"torchweld.nn.{twin.__name__}", _why_not)
    if cls is torch.nn.GELU:
        return DropIn(("activations",), partial(subclass, cls, {"forward": _gelu}), "torchweld.ops.gelu")
    if found := _of_hugging_face(cls):
        return found
    if methods := redirected_methods(cls):
        now = "its attention: torchweld.ops.scaled_dot_product_attention"
        return DropIn(("attention",), partial(subclass, cls, methods), now)
    return None


def _make(cls: type) -> Class | None:
    found = find(cls)
    return found.make() if found else None


makers.append(_make)
