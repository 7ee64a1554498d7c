"""The device, the backend and Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType

import torch

from torchweld import backend
from torchweld.errors import UserError
from torchweld.training.processes import local_rank


def pick_device(name: str | None) -> str:
    """`name` if it is here; without a name the GPU if there is one, else the CPU.

    Raises:
        UserError: no such device, or not on this machine.
    """
    rank = local_rank()
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and rank is not None:  # each process has a GPU of its own
        name = f"cuda:{rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device: expected cpu, cuda or cuda:N, but got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--device: expected a device of this machine, but got {name!r} and torch sees no GPU; "
            f"use --device cpu, or install a torch with CUDA and its driver"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device: expected at most cuda:{torch.cuda.device_count() - 1} here, but got {name!r}")
    if rank is not None and device.type == "cuda" and device.index != rank:
        raise UserError(f"--device: expected cuda, of which torchrun gives each process one, but got {name!r}")
    return name


def forced_backend(name: str | None, device: str) -> AbstractContextManager[None]:
    """The context in which `name` serves every call; without a name each call is served by the best one.

    Raises:
        UserError: no such backend, or one that cannot run on `device`.
    """
    if name is None:
        return nullcontext()
    kind = torch.device(device).type
    if name not in (kind, "reference"):
        known = f"one of {', '.join(backend.BACKENDS)}" if name not in backend.BACKENDS else f"{kind} or reference"
        raise UserError(f"--backend: expected {known} with --device {device}, but got {name!r}")
    if reason := backend.unavailable(name):
        raise UserError(f"--backend {name}: {reason}")
    return backend.use_backend(name)


@contextmanager
def deferred_interrupt(patient: bool = False) -> Iterator[Callable[[], bool]]:
    """Within it Ctrl-C only makes the yielded function return True; a second one ends the program as usual.

    If `patient`, further ones change nothing: under `torchrun` one Ctrl-C comes twice, from the terminal and from it.
    """
    seen = False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        seen = True
        if not patient:
            signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: seen
    finally:
        signal.signal(signal.SIGINT, previous)
