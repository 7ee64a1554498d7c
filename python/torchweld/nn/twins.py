"""Which drop-in replaces which class of torch.nn, and how a module changes its class from one to the other."""

from __future__ import annotations

from collections.abc import Iterable
from functools import update_wrapper
from typing import TypeVar

import torch

from torchweld._torch import has_hooks

_Class = TypeVar("_Class", bound=type[torch.nn.Module])

TWINS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {}


def twin(cls: _Class) -> _Class:
    """Registers a drop-in for the torch class that it subclasses. Its constructor gets the signature of that class."""
    base = cls.__bases__[0]
    TWINS[base] = cls
    if "__init__" in cls.__dict__:
        update_wrapper(cls.__dict__["__init__"], base.__dict__["__init__"])
    return cls


def adopt(modules: Iterable[torch.nn.Module]) -> None:
    """Changes the class of each module whose class has a drop-in. Objects and parameters stay the same."""
    for module in modules:
        if found := TWINS.get(type(module)):
            module.__class__ = found


def is_plain(module: torch.nn.Module, kind: type[torch.nn.Module]) -> bool:
    """Whether calling `module` runs the forward of `kind`, or of its twin, and nothing else: no hook sees the call."""
    return type(module) in (kind, TWINS.get(kind)) and not (has_hooks(module) or "forward" in module.__dict__)
