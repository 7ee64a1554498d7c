"""offload="cpu": parameters and gradients stay on their device; state and step are the CPU's.

A gradient travels when the step asks for it, not as soon as the backward has it: what happens in between (accumulation,
unscaling, clipping) counts. So does the parameter, for somebody may have written to it. The copies of all are queued at
once, on a stream of their own; the CPU steps a bucket of them while the next is under way, and each bucket's parameters
travel back while it steps the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from torchweld._torch import zero_all

_BUCKET_BYTES = 64 << 20  # of gradients: some milliseconds of copying and of stepping

Lists = dict[str, list[Tensor]]


def is_away(param: Tensor) -> bool:
    """Whether a parameter has to be mirrored for the CPU to step it."""
    return not param.is_cpu


@dataclass
class _Mirror:
    """A parameter and its gradient on the CPU, in memory that a GPU copies from and to by itself."""

    param: Tensor
    grad: Tensor


class Mirrors:
    """The mirrors of an optimizer's parameters, and how they are stepped."""

    def __init__(self) -> None:
        self._mirrors = WeakIdKeyDictionary()  # by parameter

    def step(
        self,
        owners: list[Tensor],
        lists: Lists,
        scalars: dict[str, Tensor | None],
        zero_grads: bool,
        update: Callable[[Lists, dict[str, Tensor | None]], None],
    ) -> None:
        """One step of `owners`, whose memory and state are in `lists`; `update` does it for lists on the CPU."""
        params, grads = lists["param"], lists["grad"]
        mirrors = [self._mirror(owner, p, g) for owner, p, g in zip(owners, params, grads, strict=True)]
        device = params[0].device
        side = torch.cuda.Stream(device) if device.type == "cuda" else None
        if side is not None:
            side.wait_stream(torch.cuda.current_stream(device))
        buckets = []
        with nullcontext() if side is None else torch.cuda.stream(side):
            for bucket in _buckets(grads):
                for i in bucket:
                    mirrors[i].grad.copy_(grads[i], non_blocking=True)
                    mirrors[i].param.copy_(params[i], non_blocking=True)
                buckets.append((bucket, None if side is None else side.record_event()))
        here = {name: None if t is None else t.cpu() for name, t in scalars.items()}
        for bucket, arrived in buckets:
            if arrived is not None:
                arrived.synchronize()
            part = {name: [each[i] for i in bucket] for name, each in lists.items()}
            part["param"], part["grad"] = ([getattr(mirrors[i], n) for i in bucket] for n in ("param", "grad"))
            update(part, here)
            if (found_inf := here["found_inf"]) is None or not found_inf:
                for i in bucket:
                    params[i].copy_(mirrors[i].param, non_blocking=True)
        if zero_grads:
            zero_all(grads)

    def _mirror(self, owner: Tensor, param: Tensor, grad: Tensor) -> _Mirror:
        mirror = self._mirrors.get(owner)
        if mirror is None or mirror.param.shape != param.shape or mirror.param.dtype != param.dtype:
            mirror = self._mirrors[owner] = _Mirror(_room(param), _room(param, grad.dtype))
        elif mirror.grad.dtype != grad.dtype:
            mirror.grad = _room(param, grad.dtype)
        return mirror


def _room(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    room = torch.empty_like(like, dtype=dtype, device="cpu")
    return room.pin_memory() if like.is_cuda else room


def _buckets(grads: list[Tensor]) -> Iterator[list[int]]:
    bucket: list[int] = []
    room = _BUCKET_BYTES
    for i, grad in enumerate(grads):
        bucket.append(i)
        room -= grad.nbytes
        if room <= 0:
            yield bucket
            bucket, room = [], _BUCKET_BYTES
    if bucket:
        yield bucket
