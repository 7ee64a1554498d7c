"""A sequence spread over processes: which chunks of it each process has, in which order, and the way there and back.

In "zigzag" order a sequence is cut into twice as many chunks as there are processes, and process r has chunks r and
2 P - 1 - r: an early and a late one. Under a causal mask, where late queries see more keys, all then have equal work.
In "contiguous" order process r has part r.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

ORDERS = ("zigzag", "contiguous")


@dataclass(frozen=True)
class Spread:
    """A sequence over the processes of `group`, of which this one is number `rank` of `count`."""

    group: Any
    rank: int
    count: int
    order: str = "zigzag"

    @classmethod
    def over(cls, op: str, mesh: DeviceMesh | Any, order: str) -> Spread:
        """Over a mesh of one dimension, or a process group; None: all processes.

        Raises:
            RuntimeError: torch.distributed is not initialised, or the mesh has several dimensions.
            ValueError: an order that does not exist.
        """
        if order not in ORDERS:
            raise ValueError(f"[{op}] order: expected 'zigzag' or 'contiguous', but got {order!r}")
        if not dist.is_initialized():
            raise RuntimeError(
                f"[{op}] mesh: expected processes that have joined, but got none; call "
                f"torch.distributed.init_process_group, and start the program with torchrun"
            )
        group: Any = mesh
        if isinstance(mesh, DeviceMesh):
            if mesh.ndim != 1:
                raise RuntimeError(
                    f"[{op}] mesh: expected one dimension, along which sequences are cut, but got {mesh.ndim}: "
                    f"{mesh.mesh_dim_names}; take one of them, mesh['name']"
                )
            group = mesh.get_group()
        return cls(group, dist.get_rank(group), dist.get_world_size(group), order)

    @property
    def chunks(self) -> int:
        """How many chunks a sequence has."""
        return self.count * self.each

    @property
    def each(self) -> int:
        """How many of them each process has."""
        return 2 if self.order == "zigzag" else 1

    def owned(self, rank: int) -> tuple[int, ...]:
        """The chunks of a process, in the order in which it has them."""
        return (rank, self.chunks - 1 - rank) if self.order == "zigzag" else (rank,)

    def global_rank(self, rank: int) -> int:
        """The process's number among all."""
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def chunk_of(self, op: str, rows: int) -> int:
        """The length of a chunk, where this process has so many rows.

        Raises:
            RuntimeError: rows that are no two chunks.
        """
        if rows % self.each:
            raise RuntimeError(
                f"[{op}] query: expected an even number of rows in each process, two chunks in zigzag order, but got "
                f"{rows}; pad the sequence to a multiple of {self.chunks}, or use order='contiguous'"
            )
        return rows // self.each

    def in_order(self, parts: list[Tensor], dim: int) -> Tensor:
        """The whole of the parts of all processes."""
        found: list[Tensor | None] = [None] * self.chunks
        for rank, part in enumerate(parts):
            for chunk, t in zip(self.owned(rank), part.chunk(self.each, dim), strict=True):
                found[chunk] = t
        return torch.cat([t for t in found if t is not None], dim)

    def part(self, t: Tensor, dim: int, rank: int) -> Tensor:
        """The part of process `rank` of a whole sequence."""
        size = t.shape[dim] // self.chunks
        return torch.cat([t.narrow(dim, chunk * size, size) for chunk in self.owned(rank)], dim)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, spread: Spread, dim: int) -> Tensor:
        ctx.spread, ctx.dim = spread, dim
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(spread.count)]
        dist.all_gather(parts, part, group=spread.group)
        return spread.in_order(parts, dim)

    @staticmethod
    def backward(ctx: Any, dwhole: Tensor) -> tuple[Tensor, None, None]:
        # Every process has a gradient of the whole: of the loss that it computes from it.
        summed = dwhole.contiguous().clone()
        dist.all_reduce(summed, group=ctx.spread.group)
        return ctx.spread.part(summed, ctx.dim, ctx.spread.rank), None, None


def shard_sequence(t: Tensor, mesh: DeviceMesh | Any = None, *, dim: int = 1, order: str = "zigzag") -> Tensor:
    """This process's part of `t`, which every process has whole.

    Args:
        mesh: of one dimension, or a process group; None: all processes.
        dim: along which `t` is cut: the tokens.
        order: "zigzag", for equal work under a causal mask, or "contiguous".

    Raises:
        RuntimeError: a length that does not divide.
        ValueError: an order that does not exist.
    """
    spread = Spread.over("shard_sequence", mesh, order)
    if t.shape[dim] % spread.chunks:
        raise RuntimeError(
            f"[shard_sequence] t: expected a multiple of {spread.chunks} along dimension {dim}, {spread.each} for each "
            f"of {spread.count} processes, but got {t.shape[dim]}; pad the sequence"
        )
    return spread.part(t, dim, spread.rank)


def gather_sequence(t: Tensor, mesh: DeviceMesh | Any = None, *, dim: int = 1, order: str = "zigzag") -> Tensor:
    """The whole of which every process has its part `t`, as `shard_sequence` cuts it; differentiable.

    The gradient of a part is the sum over the processes of what each one's loss has for it.
    """
    spread = Spread.over("gather_sequence", mesh, order)
    spread.chunk_of("gather_sequence", t.shape[dim])
    found: Tensor = _Gather.apply(t, spread, dim)
    return found


def sequence_positions(
    rows: int, mesh: DeviceMesh | Any = None, *, order: str = "zigzag", device: torch.device | str | None = None
) -> Tensor:
    """The places in the whole sequence of the `rows` tokens of this process: position_ids for a model, int64."""
    spread = Spread.over("sequence_positions", mesh, order)
    size = spread.chunk_of("sequence_positions", rows)
    return torch.cat([torch.arange(c * size, (c + 1) * size, device=device) for c in spread.owned(spread.rank)])
