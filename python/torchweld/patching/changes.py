"""The way in which a module is changed: it keeps its identity, its parameters, its hooks and its name."""

from __future__ import annotations

from typing import Protocol
from weakref import ref

import torch


class Change(Protocol):
    """Something that `patch` did to a module, which it does not keep alive."""

    def undo(self) -> str | None:
        """Takes it back; what stands in the way, and then nothing is done."""


class ClassChange:
    """The module becomes one of a subclass of its class: what isinstance, pickle and state_dict see stays true."""

    def __init__(self, module: torch.nn.Module, cls: type[torch.nn.Module]) -> None:
        self.module, self.before, self.after = ref(module), type(module), cls
        object.__setattr__(module, "__class__", cls)  # a module may have its own idea of setting attributes

    def undo(self) -> str | None:
        module = self.module()
        if module is None:
            return "it was deleted since"
        if type(module) is not self.after:
            return f"its class was changed to {type(module).__name__} since"
        object.__setattr__(module, "__class__", self.before)
        return None
