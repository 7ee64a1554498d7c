"""Which class here stands for which of torch.nn, and how a module of the one becomes one of the other."""

from __future__ import annotations

from collections.abc import Iterable
from functools import update_wrapper
from typing import TypeVar

import torch

from torchweld._torch import has_hooks

_Class = TypeVar("_Class", bound=type[torch.nn.Module])

TWINS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {}


def twin(cls: _Class) -> _Class:
    """Enters a drop-in under the class that it subclasses; its constructor shows that one's signature."""
    base = cls.__bases__[0]
    TWINS[base] = cls
    if "__init__" in cls.__dict__:
        update_wrapper(cls.__dict__["__init__"], base.__dict__["__init__"])
    return cls


def adopt(modules: Iterable[torch.nn.Module]) -> None:
    """Gives each module that is exactly of a class with a twin that twin's class: same object, same parameters."""
    for module in modules:
        if found := TWINS.get(type(module)):
            module.__class__ = found


def is_plain(module: torch.nn.Module, kind: type[torch.nn.Module]) -> bool:
    """Whether calling `module` runs the forward of `kind`, or of its twin, and nothing else: no hook sees the call."""
    return type(module) in (kind, TWINS.get(kind)) and not (has_hooks(module) or "forward" in module.__dict__)
