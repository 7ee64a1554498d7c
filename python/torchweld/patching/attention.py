"""Modules that call torch's scaled_dot_product_attention in their forward: which they are, and how they get ours."""

from __future__ import annotations

import inspect
from functools import cache
from types import CodeType, FunctionType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from torchweld import ops

_STOCK = torch.nn.functional.scaled_dot_product_attention
_FOREIGN = ("torch.", "torchweld.", "transformers.")


class _Redirect(TorchFunctionMode):
    """Inside, scaled_dot_product_attention is ours: wherever it is called, and under whatever name it was imported."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _STOCK and not types and not any(isinstance(a, torch.Tensor) and a.is_nested for a in args):
            func = ops.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def attend(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of the module's class, on the fused attention; on torch's under torch.compile.

    Dynamo cannot follow such a mode through every method of Tensor, and a compiled model must go on to compile.
    """
    if torch.compiler.is_compiling():
        return type(module).forward(module, *args, **kwargs)
    with _Redirect():
        return type(module).forward(module, *args, **kwargs)


def _names(code: CodeType) -> set[str]:
    """Every global and attribute that a function names, inner functions included."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names


@cache
def calls_attention(cls: Any) -> bool:
    """Whether a method of `cls`, or a function that one calls by its name, names scaled_dot_product_attention."""
    todo: list[Any] = [
        f for base in cls.__mro__ if not base.__module__.startswith(_FOREIGN) for f in vars(base).values()
    ]
    seen = set()
    while todo:
        f = inspect.unwrap(todo.pop())
        if not isinstance(f, FunctionType) or f in seen or f.__module__.startswith(_FOREIGN):
            continue
        seen.add(f)
        names = _names(f.__code__)
        found = [f.__globals__.get(name) for name in names]
        if _STOCK.__name__ in names or _STOCK in found:
            return True
        todo += [g for g in found if callable(g)]
    return False
