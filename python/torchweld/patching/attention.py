"""Finds modules whose methods call torch's scaled_dot_product_attention, and redirects these calls."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial, wraps
from types import CellType, CodeType, FrameType, FunctionType, MethodType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from torchweld import _torch, ops
from torchweld.nn.stock import STOCK, is_replaced

_FOREIGN = ("torch.", "torchweld.", "transformers.")
_RUN_AGAIN = ("torch.utils.checkpoint", "torch.autograd.function")


class _Redirect(TorchFunctionMode):
    """Inside, every call of scaled_dot_product_attention runs on torchweld, whatever name the caller imported it by."""

    calls_torchweld = True  # tells the ops that this mode need not see torch's function

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is STOCK and not types and not torch.compiler.is_compiling() and _may_redirect(args):
            func = ops.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def _may_redirect(args: Any) -> bool:
    if any(isinstance(a, torch.Tensor) and a.is_nested for a in args) or is_replaced():
        return False
    # An outer mode, other than a default device, must see the call as torch's.
    around = _torch.function_mode_stack()
    return all(isinstance(mode, (_Redirect, _torch.DeviceContext)) for mode in around) and not _runs_again()


def _runs_again() -> bool:
    """Whether this call is inside a checkpoint, or a function with its own backward, inside the redirected method.

    The backward runs that part again without the method, on torch's function. The forward must then use it too.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _CALL:
        if frame.f_globals.get("__name__") in _RUN_AGAIN:
            return True
        frame = frame.f_back
    return False


def _redirected(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its attention on torchweld; under torch.compile with torch's.

    Dynamo cannot trace this mode through every method of Tensor, and a compiled model must still compile.
    """

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        with _Redirect():
            return function(*args, **kwargs)

    return call


_CALL = next(c for c in _redirected.__code__.co_consts if isinstance(c, CodeType))


def redirected_methods(cls: Any) -> dict[str, Any]:
    """The methods of a class to redirect: `forward` and all that reach scaled_dot_product_attention, as each may run
    alone.

    Empty if no function of the class reaches scaled_dot_product_attention.
    """
    members: dict[str, Any] = {}
    for base in cls.__mro__:
        if not _is_foreign(base):
            members = {**vars(base), **members}
    dead: set[FunctionType] = set()
    reaching = [name for name, member in members.items() if _reaches(member, dead)]
    if not reaching:
        return {}
    forward = next(vars(base)["forward"] for base in cls.__mro__ if "forward" in vars(base))
    chosen = {name: members[name] for name in reaching if not name.startswith("__")} | {"forward": forward}
    methods = {}
    for name, member in chosen.items():
        if type(member) is FunctionType:
            methods[name] = _redirected(member)
        elif type(member) in (staticmethod, classmethod) and type(member.__func__) is FunctionType:
            methods[name] = type(member)(_redirected(member.__func__))
    return methods


def _is_foreign(thing: Any) -> bool:
    """Whether an object is of torch, transformers or this package. Code that `exec` makes has no module."""
    module = thing.__module__
    return isinstance(module, str) and module.startswith(_FOREIGN)


def _reaches(member: Any, dead: set[FunctionType]) -> bool:
    """Whether a member of a class, or a function that one calls by its name, names scaled_dot_product_attention.

    Only known code is searched: a global may be an object that has every attribute, or raises for any. `dead`:
    functions that are known not to name it. The search adds to it.
    """
    todo, seen = [member], set(dead)
    while todo:
        f = todo.pop()
        if f is STOCK:
            return True
        todo += _inside(f)
        if type(f) is not FunctionType or f in seen or _is_foreign(f):
            continue
        seen.add(f)
        names = _names(f.__code__)
        if STOCK.__name__ in names:
            return True
        todo += [f.__globals__[name] for name in names if name in f.__globals__]
        todo += [*(f.__defaults__ or ()), *(f.__kwdefaults__ or {}).values()]
        todo += _contents(f.__closure__ or ())
        todo += [f.__dict__["__wrapped__"]] if "__wrapped__" in f.__dict__ else []
    dead |= seen
    return False


def _inside(thing: Any) -> list[Any]:
    """The functions inside a wrapper of Python's own, such as a partial or a property."""
    kind = type(thing)
    if kind in (staticmethod, classmethod, MethodType):
        return [thing.__func__]
    if kind is property:
        return [thing.fget]
    return [thing.func] if kind is partial else []


def _contents(cells: tuple[CellType, ...]) -> Iterator[Any]:
    for cell in cells:
        try:
            yield cell.cell_contents
        except ValueError:  # the cell is empty
            continue


def _names(code: CodeType) -> set[str]:
    """Every global and attribute that a function names, inner functions included."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names
