"""Checks of arguments that all ops share, and the form of an error: `[op] argument: expected X, but got Y; remedy`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, SupportsFloat, SupportsIndex, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from torchweld._torch import is_zero_tensor, no_torch_function

OptionalTensor = TypeVar("OptionalTensor", Tensor, Tensor | None)
_STRIDED = torch.strided
KERNEL_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
FREED = "expected a tensor with memory, but got one whose storage is empty: it was freed, or is a ZeroTensor"

# ---- How a value is shown


def shown(value: object) -> str:
    """An argument as an error shows it: the value of plain data, else the type. Printing a tensor would read it."""
    plain = value is None or isinstance(value, (bool, int, float, str, bytes, torch.dtype))
    if isinstance(value, (list, tuple)):
        plain = all(v is None or isinstance(v, (bool, int, float, str)) for v in value)
    return repr(value) if plain else type(value).__name__


# ---- Numbers and flags. They are converted first: a conversion may run Python code that changes a tensor.


def number(op: str, name: str, value: Any, expected: str = "a number") -> float:
    """`value` as a float; raises TypeError for what is no number."""
    if type(value) is float or isinstance(value, (torch.SymFloat, torch.SymInt)):
        return cast(float, value)
    if isinstance(value, Tensor):
        check_memory(op, **{name: value})
    if type(value) is int or isinstance(value, (SupportsFloat, SupportsIndex)):  # a protocol costs 8 us
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):  # of several elements, on meta, 10^400
            pass
    raise TypeError(f"[{op}] {name}: expected {expected}, but got {shown(value)}")


def integer(op: str, name: str, value: Any, expected: str = "an integer") -> int:
    """`value` as an int; raises TypeError for what is no integer, ValueError for one of more than 64 bits."""
    if isinstance(value, torch.SymInt):
        return cast(int, value)
    if isinstance(value, Tensor):
        check_memory(op, **{name: value})
    try:
        found = operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"[{op}] {name}: expected {expected}, but got {shown(value)}") from None
    if not -(1 << 63) <= found < 1 << 63:
        raise ValueError(f"[{op}] {name}: expected {expected} of 64 bits, but got {found}")
    return found


def flag(op: str, name: str, value: Any) -> bool:
    """`value` as a bool; raises TypeError for what is neither that nor an integer."""
    if value is True or value is False:
        return value
    if isinstance(value, (int, np.bool_, torch.SymBool)):
        return bool(value)
    raise TypeError(f"[{op}] {name}: expected a bool, but got {shown(value)}")


# ---- Tensors


def is_freed(t: Tensor) -> bool:
    """Whether a tensor has elements but no memory. torch's own operators would read such a tensor without a check."""
    if torch.compiler.is_compiling() or type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return False
    try:
        with no_torch_function():  # this check must not run the code of a subclass or a mode
            # A view of an empty storage has a small address, not null.
            null = t.device.type in ("cpu", "cuda") and t.data_ptr() < 4096 and t.numel() > 0
            return null and not is_zero_tensor(t)
    except RuntimeError:  # of a tracer or a transform: it has no pointer
        return False


def _tensors(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The tensors among the arguments and in their lists, each with its name."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, (list, tuple)):
            yield from ((f"{name}[{i}]", t) for i, t in enumerate(value))


def check_memory(op: str, **arguments: Any) -> None:
    """Raises ValueError for a tensor whose storage was freed, also in a list. Called before torch's own operators."""
    for name, t in _tensors(arguments):
        if isinstance(t, Tensor) and is_freed(t):
            raise ValueError(f"[{op}] {name}: {FREED}")


def check_float(op: str, name: str, dtype: torch.dtype) -> None:
    """Raises TypeError for a dtype that neither kernels nor reference compute in. Dtypes of 8 bits only store."""
    if not dtype.is_floating_point:
        raise TypeError(f"[{op}] {name}: expected a floating-point dtype, but got {dtype}")
    if dtype.itemsize < 2:
        raise TypeError(
            f"[{op}] {name}: expected a floating-point dtype of 16 bits or more, but got {dtype}; convert it with .to()"
        )


def check_seed(op: str, seed: Tensor, device: torch.device) -> None:
    """Raises RuntimeError for what is no seed of a dropout on `device`."""
    if seed.dtype is not torch.int64 or seed.numel() != 1 or seed.device != device:
        raise RuntimeError(
            f"[{op}] seed: expected one int64 element on {device}, but got {seed.dtype} of shape "
            f"{list(seed.shape)} on {seed.device}"
        )


class NotDenseError(TypeError):
    """The error for a nested or sparse tensor, which no op takes."""


def check_dense(op: str, **tensors: Any) -> None:
    """Raises TypeError for what is no tensor, NotDenseError for a nested or sparse one."""
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"[{op}] {name}: expected a torch.Tensor, but got {type(t).__name__}")
        if t.layout is not _STRIDED or t.is_nested:
            kind = "nested" if t.is_nested else str(t.layout).removeprefix("torch.").removeprefix("_")
            remedy = "torch.nested.to_padded_tensor(x, 0.0)" if t.is_nested else "x.to_dense()"
            raise NotDenseError(
                f"[{op}] {name}: expected a dense tensor, but got a {kind} one; convert it with {remedy}"
            )


def recordable(t: OptionalTensor) -> OptionalTensor:
    """The tensor; where autograd records, a copy of one made in inference mode, for it saves no such tensor."""
    if t is None or t.requires_grad or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return t
    return t.clone() if t.is_inference() else t


def as_torch_does(error: NotDenseError, twin: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    """The result of `twin`, torch's function of the same name. Raises `error` if `twin` does not take the arguments."""
    try:
        return twin(*args, **options)
    except (RuntimeError, TypeError, ValueError):  # the first for a missing kernel too
        raise error from None


# ---- Errors of torch's own operators. The cause is looked for only after an error.

_GRAMMAR = re.compile(r"\[\w+\] ")
_KEPT = (TypeError, ValueError, IndexError, RuntimeError, NotImplementedError)
_BARE = frozenset((*_KEPT, AssertionError, AttributeError, KeyError, OverflowError, ZeroDivisionError, BufferError))


def explain(op: str, error: Exception, arguments: Mapping[str, Any]) -> NoReturn:
    """Raises `error`, which torch's operators raised for these arguments, with the op and the argument in its text.

    An error that names both is raised as it is. So is one of another class than Python's own: an out-of-memory error, a
    tracer's error.
    """
    named = _GRAMMAR.match(str(error)) is not None
    if type(error) not in _BARE or (named and not isinstance(error, TypeError)):
        raise error
    _check_plain(op, arguments, error)  # the bindings do not name the element of a list
    if named:
        raise error
    kind = type(error) if isinstance(error, _KEPT) else RuntimeError
    raise kind(f"[{op}] expected arguments that torch's operators take, but got {error}") from error


def _check_plain(op: str, arguments: Mapping[str, Any], error: Exception) -> None:
    """Raises for the first tensor that the ops do not take: sparse, quantized, on another device, lazy, a subclass."""
    home = None
    for name, t in _tensors(arguments):
        expected = got = None
        try:
            check_dense(op, **{name: t})
        except TypeError as refusal:
            raise refusal from error
        home = t.device if home is None else home
        if t.is_quantized:
            expected, got = "a tensor that is not quantized", f"{t.dtype}; convert it with .dequantize()"
        elif t.device != home and t.numel() > 1:  # a scalar may be anywhere
            expected, got = f"a tensor on {home}", f"{t.device}; move it with .to()"
        elif t.is_conj():
            expected, got = "a tensor in memory", "a lazily conjugated one; call .resolve_conj()"
        elif type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            expected, got = "a tensor with memory of its own", f"a {type(t).__name__}: {error}"
        if expected:
            raise ValueError(f"[{op}] {name}: expected {expected}, but got {got}") from error


def defined(definition: Callable[..., Any], op: str, tensors: Mapping[str, Any], *args: Any, **options: Any) -> Any:
    """`definition(*args, **options)`, a function of the reference; `tensors` names the tensors among its arguments."""
    check_memory(op, **tensors)
    try:
        return definition(*args, **options)
    except Exception as error:
        explain(op, error, tensors)
