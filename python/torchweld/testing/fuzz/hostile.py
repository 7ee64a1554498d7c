"""Hostile calls: valid calls of the public functions, the registered ops and the kernels with wrong arguments.

Allowed are a result, and an exception that names op and argument. `__main__` notices a call that ends the process.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from torchweld import backend, ops
from torchweld._torch import DataDependentOutputException, TorchDispatchMode, arguments_of
from torchweld.testing import cases
from torchweld.testing import ops as cases_by_op
from torchweld.testing.case import Case, evaluate
from torchweld.testing.fuzz.draw import Draw
from torchweld.testing.fuzz.trial import Skip, Trial
from torchweld.testing.fuzz.values import Odd, change, kinds

Call = tuple[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]]

LEVELS = ("function", "reference", "op", "kernel")
_SMALL = 30000  # elements of a case that is called thousands of times
_GRAMMAR = re.compile(r"^\[\w+\] ")
# What torch says of a fake tensor beside others or beside one of another mode, and of one that autograd cannot keep;
# what an argument itself raises.
_OTHERS = (
    "Please convert all Tensors to FakeTensors first",
    "Mixing fake modes NYI",
    "Inference tensors cannot be saved for backward",
    Odd.TEXT,
)
_INTERNAL = (AttributeError, NameError, KeyError, AssertionError, SystemError)
# torch treats these numbers as 0.
_STRICTER = "[cross_entropy] label_smoothing: expected a number in [0, 1]"
_TWINS = ("layer_norm", "rms_norm", "gelu", "cross_entropy", "scaled_dot_product_attention")


class _Kernels:
    """The compiled module, which records every call."""

    def __init__(self, module: Any, calls: list[Call]) -> None:
        self._module, self._calls = module, calls

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._module, name)
        return partial(_noted, self._calls, name, function) if callable(function) else function


class _Ops(TorchDispatchMode):
    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "torchweld":
            return _noted(self._calls, str(func), func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _noted(calls: list[Call], name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    calls.append((name, function, *_copied((args, kwargs))))
    return function(*args, **kwargs)


def _copied(value: Any) -> Any:
    """A copy with its own tensors."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {n: _copied(v) for n, v in value.items()}
    if isinstance(value, (list, tuple)):
        each = map(_copied, value)
        return type(value)(*each) if hasattr(value, "_fields") else type(value)(each)
    return value


@contextmanager
def _noting(level: str, calls: list[Call]) -> Iterator[None]:
    with ExitStack() as stack:
        if level in ("function", "reference"):
            for name in ops.__all__:
                noted = partial(_noted, calls, name, getattr(ops, name))
                stack.enter_context(mock.patch.object(ops, name, noted))
        elif level == "op":
            stack.enter_context(_Ops(calls))
        else:
            stack.enter_context(mock.patch.dict(backend.kernels, cpu=_Kernels(backend.kernels["cpu"], calls)))
        yield


@cache
def small_cases(op: str) -> tuple[Case, ...]:
    return tuple(c for c in cases(op) if sum(t.numel() for t in c.inputs(c.dtypes[0]).values()) < _SMALL)


@cache
def _calls(op: str, index: int, dtype: torch.dtype, level: str) -> list[Call]:
    case = small_cases(op)[index]
    calls: list[Call] = []
    with _noting(level, calls):
        evaluate(case, case.ours, case.inputs(dtype))
    return calls


@dataclass(frozen=True, kw_only=True)
class Hostile(Trial):
    """Call number `call` of what case number `case` of `of` calls at a `level`.

    `changes`: which arguments, by name or number, are replaced by which kind of value (see `values`).
    """

    of: str
    case: int
    level: str
    call: int = 0
    dtype: torch.dtype = torch.float32
    changes: tuple[tuple[str, str], ...]

    def arguments(self) -> tuple[str, Callable[..., Any], dict[str, Any]]:
        """The function and all its arguments: positional ones by number, in their order, then those by name."""
        calls = _calls(self.of, self.case, self.dtype, self.level)
        if not calls:
            raise Skip("nothing is called at this level")
        name, function, args, kwargs = calls[self.call % len(calls)]
        return name, function, {str(i): a for i, a in enumerate(args)} | kwargs

    def smaller(self) -> Iterator[Trial]:
        for i in range(len(self.changes)):
            yield replace(self, changes=self.changes[:i] + self.changes[i + 1 :])

    def check(self) -> None:
        name, function, arguments = self.arguments()
        arguments = {n: _copied(a) for n, a in arguments.items()}
        for n, kind in self.changes:
            if n in arguments:
                if self.level == "op" and "freed" in kind:
                    self._check_freed(function, int(n))
                arguments[n] = change(arguments[n], kind)
        args = [a for n, a in arguments.items() if n.isdigit()]
        kwargs = {n: a for n, a in arguments.items() if not n.isdigit()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            public = self.level in ("function", "reference")
            expected = self._twin(name, args, kwargs) if public and name in _TWINS else None
            with backend.use_backend("reference") if self.level == "reference" else nullcontext():
                got = _outcome(function, *args, **kwargs)
        _judge(got, expected, strict=public)

    def _check_freed(self, function: Any, position: int) -> None:
        """Skips freed tensors that torch's dispatcher reads itself."""
        if "Tensor" not in str(arguments_of(function)[position].type):
            raise Skip("a tensor that stands for a number")
        if any(kind.endswith("fake") for _, kind in self.changes):
            raise Skip("what stands beside a fake tensor: it is printed")

    def _twin(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """torch's result; None if the call would end the process, or torch has no such function."""
        kinds = [kind for _, kind in self.changes]
        # Memory is gone; a ZeroTensor has none, which torch alone knows.
        if any("freed" in kind or kind.endswith("ZeroTensor") for kind in kinds):
            return None
        # Its layer norm of nested tensors divides by the number of elements; and it has no zero-centred weight.
        if "nested" in kinds and any(isinstance(a, (tuple, list)) and 0 in a for a in args[1:2]):
            return None
        options = {n: a for n, a in kwargs.items() if n != "zero_centered_weight" or a is not False}
        if "zero_centered_weight" in options:
            return None
        return _outcome(getattr(torch.nn.functional, name), *args, **options)


def _outcome(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        result = function(*args, **kwargs)
        if isinstance(result, Tensor) and result.requires_grad and result.is_floating_point():
            result.sum().backward(retain_graph=True)
    except Exception as error:  # the class of the error is judged
        return error
    return result


def _judge(got: Any, expected: Any, strict: bool) -> None:
    """Raises if an outcome is wrong beside torch's. `strict`: errors must have the grammar."""
    if isinstance(got, Exception):
        # torch checks nothing where there are no elements.
        served = isinstance(expected, Tensor) and expected.numel() > 0
        if served and not str(got).startswith(_STRICTER):
            raise AssertionError(f"torch serves it, but got {type(got).__name__}: {got}") from got
        alike = type(expected) is type(got) and str(expected) == str(got)
        if alike or str(got).startswith(_OTHERS) or isinstance(got, DataDependentOutputException):
            return
        if isinstance(got, _INTERNAL) or (strict and not _GRAMMAR.search(str(got))):
            raise got
    elif isinstance(expected, Tensor) and isinstance(got, Tensor) and not expected.is_nested:
        seen, right = ((t.dtype, tuple(t.shape), t.device) for t in (got, expected))
        if seen != right:
            raise AssertionError(f"expected {right} as torch's, but got {seen}")


def _names(draw: Draw, arguments: dict[str, Any]) -> list[str]:
    return draw.some(list(arguments))[: draw.one(1, 1, 1, 2)]


def hostile(draw: Draw) -> Hostile:
    of = draw.one(*cases_by_op())
    found = small_cases(of)
    index = draw.one(*range(len(found)))
    base = Hostile(
        of=of,
        case=index,
        level=draw.one(*LEVELS),
        call=draw.one(0, 0, 1, 2, 3),
        dtype=draw.one(*found[index].dtypes),
        changes=(),
    )
    try:
        arguments = base.arguments()[2]
    except Skip:
        return base
    changes = tuple((n, draw.one(*kinds(arguments[n]))) for n in _names(draw, arguments))
    return replace(base, changes=changes)
