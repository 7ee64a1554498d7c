"""Messages between the processes of a spread sequence: keys, values and their gradients, and all-to-all."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchweld.distributed.sequence import Spread


class Message:
    """Tensors on their way to process `to`, and others from process `source`, all of the dtype and device of `like`.

    They travel as soon as this exists. Nothing is sent where `sent` is empty, nothing received where `shapes` is.
    """

    def __init__(
        self,
        op: str,
        spread: Spread,
        like: Tensor,
        *,
        to: int,
        sent: Sequence[Tensor],
        source: int,
        shapes: Sequence[Sequence[int]],
        tag: int,
    ) -> None:
        self.op, self.shapes = op, shapes
        operations = []
        if sent:
            self._sent = torch.cat([t.reshape(-1) for t in sent])
            operations.append(dist.P2POp(dist.isend, self._sent, spread.global_rank(to), spread.group, tag))
        self._received = like.new_empty(sum(map(math.prod, shapes)))
        if shapes:
            operations.append(dist.P2POp(dist.irecv, self._received, spread.global_rank(source), spread.group, tag))
        try:
            self._works = dist.batch_isend_irecv(operations) if operations else []
        except RuntimeError as error:
            raise lost(op, error) from error

    def wait(self) -> list[Tensor]:
        """What has arrived.

        Raises:
            RuntimeError: the other process is gone, or late.
        """
        try:
            for work in self._works:
                work.wait()
        except RuntimeError as error:
            raise lost(self.op, error) from error
        ends = [0]
        for shape in self.shapes:
            ends.append(ends[-1] + math.prod(shape))
        return [self._received[a:b].view(*s) for (a, b), s in zip(pairwise(ends), self.shapes, strict=True)]


class _AllToAll(torch.autograd.Function):
    """Part p of the first dimension goes to process p; the result has those of all processes, in their order."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, op: str, spread: Spread) -> Tensor:
        ctx.op, ctx.spread = op, spread
        t = t.contiguous()
        parts = torch.empty_like(t)
        try:
            dist.all_to_all_single(parts, t, group=spread.group)
        except RuntimeError as error:
            raise lost(op, error) from error
        return parts

    @staticmethod
    def backward(ctx: Any, dparts: Tensor) -> tuple[Tensor, None, None]:
        dt: Tensor = _AllToAll.apply(dparts, ctx.op, ctx.spread)
        return dt, None, None


def all_to_all(t: Tensor, op: str, spread: Spread) -> Tensor:
    """Differentiable; see `_AllToAll`."""
    found: Tensor = _AllToAll.apply(t, op, spread)
    return found


def agree(op: str, spread: Spread, device: torch.device, **facts: object) -> None:
    """Raises in every process where they call with different sizes or options, rather than waiting for each other.

    Raises:
        RuntimeError: they differ, or a process is gone.
    """
    own = torch.tensor([zlib.crc32(repr(facts).encode())], dtype=torch.int64, device=device)
    found = [torch.empty_like(own) for _ in range(spread.count)]
    try:
        dist.all_gather(found, own, group=spread.group)
    except RuntimeError as error:
        raise lost(op, error) from error
    strange = [rank for rank, other in enumerate(found) if not torch.equal(other, found[0])]
    if strange:
        raise RuntimeError(
            f"[{op}] query, key, value: expected the same shapes, dtypes and options in all {spread.count} processes, "
            f"but got others in {strange} than in 0; here {facts}"
        )


def lost(op: str, error: Exception) -> RuntimeError:
    """The error where a message does not arrive."""
    return RuntimeError(
        f"[{op}] mesh: expected an answer of every process, but got: {error}; a process has ended or is late: look at "
        f"the first error among all"
    )
