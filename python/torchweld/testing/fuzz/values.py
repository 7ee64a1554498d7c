"""Values that no argument expects, by kind. Each is made from the valid value that it replaces."""

# ruff: noqa: C417, PLW0108 (a table whose entries read alike)

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchweld import _torch


class Subclass(Tensor):
    """A tensor in all but its type."""


class Odd:
    """An object that gives wrong answers as a number or a list."""

    TEXT = "neither a number nor a list"

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        raise ValueError(self.TEXT)

    def __float__(self) -> float:
        raise ValueError(self.TEXT)

    __index__ = __float__


def _freed(t: Tensor) -> Tensor:
    """A view of a storage that was freed, as FSDP frees it.

    One that is only shorter than its views is not drawn: torch reads and writes beyond it, and neither Python nor
    DLPack tells its length at a price that a call could pay.
    """
    t.untyped_storage().resize_(0)
    return t


def _fake(t: Tensor) -> Tensor:
    with _torch.FakeTensorMode() as mode:
        return mode.from_tensor(t)


def _inference(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


def _integers(t: Tensor, value: int) -> Tensor:
    return torch.full_like(t, value) if not t.is_floating_point() and t.dtype is not torch.bool else t.long() + value


def _outside(t: Tensor) -> Tensor:
    """A view whose rows would go on past its memory, if that were not larger than it says."""
    return torch.as_strided(t, (*t.shape[:-1], 1), (*(0 for _ in t.shape[:-1]), 1)) if t.dim() else t


_DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64),
)


def _first(values: Any, how: Callable[[Tensor], Any]) -> Any:
    return [how(values[0]), *values[1:]] if len(values) and isinstance(values[0], Tensor) else values


TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "None": lambda t: None,
    "int": lambda t: 3,
    "str": lambda t: "tensor",
    "list": lambda t: t.tolist(),
    "array": lambda t: t.float().numpy(),
    "type": lambda t: Tensor,
    "odd": lambda t: Odd(),
    **{str(d)[6:]: partial(Tensor.to, dtype=d) for d in _DTYPES},
    "float8": lambda t: t.float().to(torch.float8_e4m3fn),
    "scalar": lambda t: t.flatten()[:1].sum(),
    "empty": lambda t: t.flatten()[:0],
    "no rows": lambda t: t[:0] if t.dim() else t,
    "one dimension more": lambda t: t.unsqueeze(0),
    "one dimension less": lambda t: t[0] if t.dim() and t.shape[0] else t,
    "many dimensions": lambda t: t.view(*(1,) * 20, *t.shape),
    "longer": lambda t: torch.cat([t, t]) if t.dim() else t,
    "shorter": lambda t: t[: t.shape[0] // 2] if t.dim() else t,
    "narrower": lambda t: t[..., :-1] if t.dim() else t,
    "transposed": lambda t: t.mT if t.dim() > 1 else t,
    "flipped": lambda t: t.flatten().flip(0).view(t.shape),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "stride 0": lambda t: t.flatten()[:1].sum().expand(t.shape),
    "overlapping": _outside,
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "csr": lambda t: t.to_sparse_csr() if t.dim() == 2 else t.to_sparse(),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "jagged": lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
    "mkldnn": lambda t: t.float().to_mkldnn(),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "fake": _fake,
    "freed": _freed,
    "freed float64": lambda t: _freed(t.double()),
    "freed int64": lambda t: _freed(t.long()),
    "ZeroTensor": _torch.lazily_zero,
    "negated": _torch.lazily_negated,
    "conjugated": lambda t: t.to(torch.complex64).conj(),
    "imaginary": lambda t: t.to(torch.complex64).conj().imag,
    "parameter": lambda t: torch.nn.Parameter(t, requires_grad=t.is_floating_point()),
    "requires grad": lambda t: t.clone().requires_grad_(t.is_floating_point()),
    "no leaf": lambda t: t.clone().requires_grad_(t.is_floating_point()) * 1,
    "inference": _inference,
    "subclass": lambda t: t.as_subclass(Subclass),
    "wrapper": _torch.two_tensors,
    "NaN": lambda t: t.float() * math.nan,
    "infinite": lambda t: torch.full_like(t, math.inf) if t.is_floating_point() else t,
    "-1": lambda t: _integers(t, -1),
    "1000": lambda t: _integers(t, 1000),
    "2^31": lambda t: _integers(t, 2**31 - 1),
    "-2^31": lambda t: _integers(t, -(2**31)),
    "2^62": lambda t: _integers(t.long(), 2**62),
    "descending": lambda t: t.flip(0) if t.dim() else t,
}
NUMBERS: dict[str, Callable[[Any], Any]] = {
    "None": lambda v: None,
    "str": lambda v: "1",
    "nan": lambda v: math.nan,
    "inf": lambda v: math.inf,
    "-inf": lambda v: -math.inf,
    "0": lambda v: 0,
    "0.0": lambda v: 0.0,
    "-1": lambda v: -1,
    "-1.5": lambda v: -1.5,
    "2": lambda v: 2,
    "1e300": lambda v: 1e300,
    "1e-300": lambda v: 1e-300,
    "2^31": lambda v: 2**31,
    "2^62": lambda v: 2**62,
    "2^63": lambda v: 2**63,
    "-2^63": lambda v: -(2**63),
    "2^100": lambda v: 2**100,
    "True": lambda v: True,
    "complex": lambda v: 1j,
    "Decimal": lambda v: Decimal("0.5"),
    "tensor": lambda v: torch.tensor(0.5),
    "integer tensor": lambda v: torch.tensor(1),
    "two elements": lambda v: torch.ones(2),
    "meta": lambda v: torch.ones((), device="meta"),
    "freed": lambda v: _freed(torch.ones(1)),
    "list": lambda v: [v],
    "odd": lambda v: Odd(),
}
LISTS: dict[str, Callable[[Any], Any]] = {
    "None": lambda v: None,
    "int": lambda v: 3,
    "str": lambda v: "list",
    "empty": lambda v: type(v)(),
    "generator": lambda v: (each for each in v),
    "fresh generator": lambda v: (each.clone() if isinstance(each, Tensor) else each for each in v),
    "iterator": lambda v: iter(v),
    "map": lambda v: map(lambda each: each * 1 if each is not None else each, v),
    "tuple": lambda v: tuple(v),
    "set": lambda v: set(v) if all(isinstance(e, (int, Tensor)) for e in v) else v,
    "dict": lambda v: dict(enumerate(v)),
    "longer": lambda v: [*v, *v],
    "shorter": lambda v: list(v)[:-1],
    "with None": lambda v: [None, *list(v)[1:]],
    "with str": lambda v: ["x", *list(v)[1:]],
    "with huge": lambda v: [2**63, *list(v)[1:]],
    "with negative": lambda v: [-1, *list(v)[1:]],
    "with freed": lambda v: [_freed(torch.ones(1, dtype=torch.int64)), *list(v)[1:]],
    "zeros": lambda v: [0 for _ in v],
    "nested": lambda v: [list(v)],
    "repeated": lambda v: [v[0]] * len(v) if len(v) else v,
    "stacked": lambda v: torch.cat([e.flatten() for e in v]) if v and all(isinstance(e, Tensor) for e in v) else v,
    "odd": lambda v: Odd(),
    **{f"first {name}": partial(_first, how=how) for name, how in TENSORS.items()},
}
OTHERS: dict[str, Callable[[Any], Any]] = {
    "None": lambda v: None,
    "int": lambda v: 7,
    "str": lambda v: "other",
    "bytes": lambda v: b"x",
    "float": lambda v: 0.5,
    "tensor": lambda v: torch.ones(3),
    "integers": lambda v: torch.ones(3, dtype=torch.int64),
    "tuple": lambda v: (1, 2),
    "odd": lambda v: Odd(),
    "freed": lambda v: _freed(torch.ones(4, dtype=torch.float64)),
}


def _kinds(value: Any) -> dict[str, Callable[[Any], Any]]:
    if isinstance(value, Tensor):
        return TENSORS
    if isinstance(value, (int, float)):
        return NUMBERS
    return LISTS if isinstance(value, Sequence) and not isinstance(value, str) else OTHERS


def kinds(value: Any) -> tuple[str, ...]:
    return tuple(_kinds(value))


def change(value: Any, kind: str) -> Any:
    """The replacement of `value`, or `value` if torch cannot make that kind from it."""
    try:
        return _kinds(value)[kind](value)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError):
        return value
