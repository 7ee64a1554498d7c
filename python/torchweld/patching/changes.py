"""Changes of modules. A changed module keeps its identity, its parameters, its hooks and its name."""

from __future__ import annotations

from typing import Protocol
from weakref import ref

import torch


class Change(Protocol):
    """A change that `patch` made to a module. It does not keep the module alive."""

    def undo(self) -> str | None:
        """Takes the change back. If that is not possible, returns the reason and does nothing."""


class ClassChange:
    """The module gets a subclass of its class, so that isinstance, pickle and state_dict stay valid."""

    def __init__(self, module: torch.nn.Module, cls: type[torch.nn.Module]) -> None:
        self.module, self.before, self.after = ref(module), type(module), cls
        object.__setattr__(module, "__class__", cls)  # a module may define its own __setattr__

    def undo(self) -> str | None:
        module = self.module()
        if module is None:
            return "it was deleted since"
        if type(module) is not self.after:
            return f"its class was changed to {type(module).__name__} since"
        object.__setattr__(module, "__class__", self.before)
        return None
