"""Subclasses of other libraries' modules that change some methods and nothing else that can be seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch

from torchweld.nn.twins import of_class

Class = type[torch.nn.Module]


class Swapped(torch.nn.Module):
    """The base of such subclasses. A module of one is copied, pickled and replicated as a module of the original class.

    The changed methods are in the class and take `self`: nothing is bound to one module.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Does not call the original's: a class that registers its subclasses must not register this one."""
        if Swapped not in cls.__bases__:
            super().__init_subclass__(**kwargs)

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """For torch.jit.script, which compiles the original."""
        cls = type(self)
        return of_class(self, original_of(cls)) if is_swapped(cls) else self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles by the original class, for this one cannot be imported."""
        found, cls = super().__reduce_ex__(protocol), type(self)
        if not isinstance(found, tuple) or not is_swapped(cls):
            return found
        (function, args, *rest), original = found, original_of(cls)
        return _rebuild, (function, *(original if a is cls else a for a in args)), *rest


def _rebuild(function: Callable[..., Any], *args: Any) -> Any:
    """The function that pickle calls: a module of the original class, swapped if that class still has a drop-in."""
    module = function(*args)
    cls = _alive(type(module)) or made_for(type(module))
    if cls is not None:
        object.__setattr__(module, "__class__", cls)
    return module


def is_swapped(cls: type) -> bool:
    """Whether `subclass` made the class."""
    return Swapped in cls.__bases__


def original_of(cls: type) -> Any:
    """The original class of a swapped one."""
    return cls.__bases__[1]


def made_for(cls: type) -> Class | None:
    """The drop-in for a class of module that is read from a pickle; None where it has none."""
    found = (make(cls) for make in makers)
    return next((each for each in found if each is not None), None)


# What makes the drop-ins. drop_ins.py, which uses this file, adds its function.
makers: list[Callable[[type], Class | None]] = []

# Weak keys and values: a class is freed with the last of its modules.
_made: WeakKeyDictionary[type, ref[Class]] = WeakKeyDictionary()


def _alive(cls: type) -> Class | None:
    made = _made.get(cls)
    return None if made is None else made()


def subclass(cls: Class, methods: Mapping[str, Any]) -> Class:
    """The subclass of `cls` with these methods. It is the same class as long as a module of it lives."""
    found = _alive(cls)
    if found is None:
        body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, **methods}
        metaclass: Any = type(cls)
        found = metaclass(cls.__name__, (Swapped, cls), body)
        _made[cls] = ref(found)
    return found
