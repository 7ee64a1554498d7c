"""Messages between the processes of a spread sequence: keys, values and their gradients, and all-to-all."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchweld.distributed.sequence import Spread


class Message:
    """Tensors on their way to process `to`, and others from process `source`, all of the dtype and device of `like`.

    They travel as soon as this exists. Nothing is sent where `sent` is empty, nothing received where `shapes` is. Tags
    from `tag` on tell messages of two processes apart, one for each tensor.
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
        self.op = op
        self._sent = [t.contiguous() for t in sent]  # most lie so already, and are not copied
        self._received = [like.new_empty(shape) for shape in shapes]
        to, source = spread.global_rank(to), spread.global_rank(source)
        operations = [dist.P2POp(dist.isend, t, to, spread.group, tag + i) for i, t in enumerate(self._sent)] + [
            dist.P2POp(dist.irecv, t, source, spread.group, tag + i) for i, t in enumerate(self._received)
        ]
        try:
            self._works = dist.batch_isend_irecv(operations) if operations else []
        except RuntimeError as error:
            raise lost(op, error) from error

    def wait(self) -> list[Tensor]:
        """What has arrived. The message is then empty.

        Raises:
            RuntimeError: the other process is gone, or late.
        """
        try:
            for work in self._works:
                work.wait()
        except RuntimeError as error:
            raise lost(self.op, error) from error
        found, self._sent, self._received = self._received, [], []
        return found


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
