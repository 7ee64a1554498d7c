"""Which drop-in replaces which class of torch.nn, and how a module changes its class from one to the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial, update_wrapper, wraps
from typing import Any, TypeVar

import torch

from torchweld._torch import has_hooks

_Class = TypeVar("_Class", bound=type[torch.nn.Module])

TWINS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {}


def twin(cls: _Class) -> _Class:
    """Registers a drop-in for the torch class that it subclasses. Its constructor gets the signature of that class."""
    base = cls.__bases__[0]
    TWINS[base] = cls
    cls.__prepare_scriptable__ = stock  # type: ignore[attr-defined]
    if "__init__" in cls.__dict__:
        update_wrapper(cls.__dict__["__init__"], base.__dict__["__init__"])
    return cls


def stock(module: torch.nn.Module) -> torch.nn.Module:
    """The layer of torch.nn that torch.jit.script compiles for a drop-in, with the same parameters."""
    base = next((base for base, cls in TWINS.items() if cls is type(module)), None)
    return module if base is None else of_class(module, base)


def of_class(module: torch.nn.Module, cls: type[torch.nn.Module]) -> torch.nn.Module:
    """A module of another class with the same parameters, buffers, children and hooks."""
    found = cls.__new__(cls)
    found.__dict__.update(module.__dict__)
    found.__dict__["_modules"] = {**found.__dict__["_modules"]}
    return found


def is_proxy(x: object) -> bool:
    """Whether `x` stands for a value in a trace by torch.fx."""
    return type(x).__module__ == "torch.fx.proxy"


def record(module: torch.nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`forward(*args, **kwargs)`; in a trace by torch.fx one node for the layer, as for the layers of torch.nn."""
    first = args[0] if args else next(iter(kwargs.values()), None)
    if is_proxy(first):
        tracer: Any = first.tracer  # type: ignore[union-attr]
        if path := tracer.path_of_module(module):  # empty for the module that is traced
            return tracer.create_proxy("call_module", path, args, kwargs)
    return forward(*args, **kwargs)


def traceable(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a layer with `record` around it."""

    @wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return record(self, partial(forward, self), *args, **kwargs)

    return call


def adopt(modules: Iterable[torch.nn.Module]) -> None:
    """Changes the class of each module whose class has a drop-in. Objects and parameters stay the same."""
    for module in modules:
        if found := TWINS.get(type(module)):
            module.__class__ = found


def is_plain(module: torch.nn.Module, kind: type[torch.nn.Module]) -> bool:
    """Whether calling `module` runs the forward of `kind`, or of its twin, and nothing else: no hook sees the call."""
    return type(module) in (kind, TWINS.get(kind)) and not (has_hooks(module) or "forward" in module.__dict__)
