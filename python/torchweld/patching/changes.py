"""The two ways in which a module is changed; both keep the object, its parameters, its hooks and its name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch


class Change(Protocol):
    """Something that `patch` did to a module."""

    def undo(self) -> str | None:
        """Takes it back; what stands in the way, and then nothing is done."""


class ClassChange:
    """The module becomes one of a subclass of its class: what isinstance, pickle and state_dict see stays true."""

    def __init__(self, module: torch.nn.Module, cls: type[torch.nn.Module]) -> None:
        self.module, self.before, self.after = module, type(module), cls
        module.__class__ = cls

    def undo(self) -> str | None:
        if type(self.module) is not self.after:
            return f"its class was changed to {type(self.module).__name__} since"
        self.module.__class__ = self.before
        return None


class ForwardChange:
    """The module keeps its class and gets a forward of its own; a partial, since that is copied and pickled with it."""

    def __init__(self, module: torch.nn.Module, forward: Callable[..., Any]) -> None:
        self.module, self.forward = module, partial(forward, module)
        module.forward = self.forward

    def undo(self) -> str | None:
        if self.module.__dict__.get("forward") is not self.forward:
            return "its forward was changed since"
        del self.module.__dict__["forward"]
        return None
