"""Memory edges: the kernels' tensors end, or begin, at a page that must not be touched."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from torchweld import backend

SIDES = ("end", "begin")
_PAGE, _NO_ACCESS = mmap.PAGESIZE, 0
_libc = ctypes.CDLL(None, use_errno=True)


def guarded(size: int, side: str) -> tuple[mmap.mmap, int]:
    """Memory between two inaccessible pages, and the offset in it at which `size` bytes lie at one of the two."""
    inner = max(_PAGE, -(-size // _PAGE) * _PAGE)
    memory = mmap.mmap(-1, inner + 2 * _PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (start, start + _PAGE + inner):
        if _libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(_PAGE), _NO_ACCESS):
            raise OSError(ctypes.get_errno(), "mprotect")
    return memory, _PAGE if side == "begin" else _PAGE + inner - size


def flat(t: Tensor) -> Tensor:
    """All memory from the first to the last element of `t`."""
    span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return torch.as_strided(t.detach(), (span,), (1,))


def at_edge(t: Tensor, side: str) -> Tensor:
    """`t` with the same strides in memory whose first or last byte, by `side`, is beside an inaccessible page."""
    if t.numel() == 0 or not t.is_cpu:
        return t
    old = flat(t)
    memory, offset = guarded(old.nbytes, side)
    new = torch.frombuffer(memory, dtype=t.dtype, count=old.numel(), offset=offset).copy_(old)
    return new.as_strided(t.shape, t.stride())


class _Edged:
    """The compiled module. Its functions get copies of their tensors at the edges, whose results are copied back."""

    def __init__(self, module: ModuleType, side: str) -> None:
        self._module, self._side = module, side

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._module, name)
        if not callable(function) or name in ("isa", "use_isa", "available_isas", "built_isas"):
            return function

        def call(*args: Any, **named: Any) -> Any:
            moved: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

            def move(arg: Any) -> Any:
                if isinstance(arg, Tensor):
                    new = at_edge(arg, self._side)
                    before = arg if new is arg else flat(new).view(torch.uint8).clone()
                    return moved.setdefault(id(arg), (arg, new, before))[1]
                if isinstance(arg, (list, tuple)):
                    each = map(move, arg)
                    return type(arg)(*each) if hasattr(arg, "_fields") else type(arg)(each)
                return arg

            result = function(*map(move, args), **{name: move(arg) for name, arg in named.items()})
            for old, new, before in moved.values():
                # Only what was written: two outputs may lie between each other in memory.
                if new is not old and bool((written := flat(new).view(torch.uint8) != before).any()):
                    flat(old).view(torch.uint8)[written] = flat(new).view(torch.uint8)[written]
            return result

        return call


@contextmanager
def at_edges(side: str) -> Iterator[None]:
    """Inside the block the CPU kernels' tensors are at memory edges. An empty `side` changes nothing."""
    module = backend.kernels["cpu"]
    if side:
        backend.kernels["cpu"] = _Edged(module, side)  # type: ignore[assignment]
    try:
        yield
    finally:
        backend.kernels["cpu"] = module
