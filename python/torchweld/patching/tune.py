"""patch(model, tune=...): times each kind of swap on what its modules are called with, and keeps it if it is faster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchweld.patching.report import Entry, Report, Times

_ROUNDS, _SHORTEST = 7, 5e-3  # timings of each side, in turn, each of so many seconds or one call
_NOISE = 1.02  # a swap stays if it is no slower than this; two timings of the same call differ by about as much


class Call(NamedTuple):
    """What a module was called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def signature(self) -> str:
        """Calls with the same one take the same time."""
        return "; ".join(_described(each) for each in (*self.args, *self.kwargs.items()))


def example_call(inputs: Any) -> Call:
    """`example_inputs` of patch: a tensor, a sequence of arguments, or a mapping of named ones."""
    if isinstance(inputs, Tensor):
        return Call((inputs,), {})
    if isinstance(inputs, Mapping):
        return Call((), dict(inputs))
    if isinstance(inputs, Sequence) and not isinstance(inputs, (str, bytes)):
        return Call(tuple(inputs), {})
    expected = "a tensor, a sequence of arguments or a mapping of named ones, as the model is called with"
    raise TypeError(f"[patch] example_inputs: expected {expected}, but got {type(inputs).__name__}")


def tune(model: torch.nn.Module, report: Report, call: Call, training: bool) -> None:
    """Takes back the swaps of `report` that are slower than what they replace, on what one call of the model brings.

    Each swap is timed once for all modules of one class with inputs of the same shapes, dtypes and numbers: forward,
    and with `training` backward too. Parameters, their gradients, buffers and random generators stay as they are.
    """
    with _unchanged(model), torch.set_grad_enabled(training):
        seen = _calls(model, [entry.name for entry in report.swapped], call)
        timed: dict[tuple[Any, ...], Times] = {}
        for entry in reversed(list(report.swapped)):  # those inside others first
            inside = seen.get(entry.name, "not called by example_inputs")
            if isinstance(inside, str):
                report.keep(entry, f"{inside}, not timed")
                continue
            module = model.get_submodule(entry.name)
            key = (entry.was, entry.now, inside.signature)
            if key not in timed:
                timed[key] = _times(report, entry, lambda m=module, c=inside: _step(m, c, training))  # type: ignore[misc]
            times = timed[key]
            if times.now > times.before * _NOISE:
                report.take_back(entry, f"slower here: {times}")
            else:
                report.keep(entry, str(times))


def _times(report: Report, entry: Entry, step: Callable[[], None]) -> Times:
    """Seconds of a call with the swap and without, each the least of several: other work only adds to it."""
    found: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(_ROUNDS):
        for swapped in (True, False):
            if not swapped:
                report.suspend(entry)
            try:
                found[swapped].append(_seconds(step))
            finally:
                if not swapped:
                    report.resume(entry)
    return Times(now=min(found[True]), before=min(found[False]))


def _seconds(step: Callable[[], None]) -> float:
    """Seconds of a call, over as many as take a few milliseconds; the first call is not counted."""
    step()
    calls, begin = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < _SHORTEST or calls == 0:
        step()
        calls += 1
    return elapsed / calls


def _step(module: torch.nn.Module, call: Call, training: bool) -> None:
    output = module(*call.args, **call.kwargs)
    if training:
        outputs = [t for t in _tensors(output) if t.requires_grad]
        leaves = [t for t in (*_tensors(call), *module.parameters()) if t.requires_grad]
        if outputs and leaves:
            torch.autograd.grad(outputs, leaves, [torch.ones_like(t) for t in outputs], allow_unused=True)
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _calls(model: torch.nn.Module, names: Sequence[str], call: Call) -> dict[str, Call | str]:
    """What the modules with these names are called with first in one call of the model: copies, off any graph.

    In place of a call that cannot be made twice stands the reason: a cache, for example, would grow with each.
    """
    seen: dict[str, Call | str] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name not in seen:
                try:
                    seen[name] = Call(*_apart((args, kwargs)))
                except _OddArgumentError as odd:
                    seen[name] = f"called with a {odd}"

        return hook

    handles = [model.get_submodule(n).register_forward_pre_hook(record(n), with_kwargs=True) for n in names]
    try:
        model(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@contextmanager
def _unchanged(model: torch.nn.Module) -> Iterator[None]:
    """Buffers and random generators are after the block as before it."""
    buffers = {b: b.detach().clone() for b in model.buffers()}
    try:
        with torch.random.fork_rng():
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers.items():
                buffer.copy_(before)


class _OddArgumentError(Exception):
    """An argument that may change with every call, by the name of its class."""


_CONSTANT = (bool, int, float, str, torch.dtype, torch.device, torch.nn.Module, type(None))


def _apart(value: Any) -> Any:
    """`value` with every tensor inside replaced by a copy that is a leaf."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if type(value) is dict:
        return {k: _apart(v) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map(_apart, value))
    if not isinstance(value, _CONSTANT):
        raise _OddArgumentError(type(value).__name__)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.stride()} {value.dtype} {value.requires_grad}"
    if isinstance(value, (tuple, list)):
        return f"({'; '.join(map(_described, value))})"
    return str(value) if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__
