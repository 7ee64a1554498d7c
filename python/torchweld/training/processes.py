"""The processes that train one model together, as `torchrun` starts them; or this one alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from torchweld.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among `count`, and its device. The first one, of rank 0, is the one that prints and saves.

    Attributes:
        parallel: what they share: "data" and "fsdp" the sequences of a batch, "tensor" the layers of the model,
            "context" the tokens of each sequence.
    """

    rank: int = 0
    count: int = 1
    device: str = "cpu"
    parallel: str = "data"

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def replicas(self) -> int:
        """Among how many the sequences of a batch are shared."""
        return self.count if self.parallel in ("data", "fsdp") else 1

    @property
    def replica(self) -> int:
        """Which of them this process belongs to."""
        return self.rank if self.replicas > 1 else 0

    def share(self, parts: Sequence[T]) -> Sequence[T]:
        """This process's ones of the parts of all, whose number is a multiple of the replicas'."""
        each = len(parts) // self.replicas
        return parts[self.replica * each : (self.replica + 1) * each]

    def mean(self, *values: float) -> list[float]:
        """The mean over all processes of each value."""
        if self.count == 1:
            return list(values)
        reduced = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(reduced)
        return (reduced / self.count).tolist()

    def any(self, flag: bool) -> bool:
        """Whether it is so in any of them."""
        return self.mean(float(flag))[0] > 0

    def by_first(self, act: Callable[[], T]) -> T:
        """What `act` comes to in the first one; a UserError there is one in all."""
        said: list[Any] = [None, None]
        if self.first:
            try:
                said[0] = act()
            except UserError as error:
                said[1] = str(error)
        if self.count > 1:
            dist.broadcast_object_list(said, device=torch.device(self.device))
        if said[1] is not None:
            raise UserError(said[1])
        found: T = said[0]
        return found

    @contextmanager
    def one_after_another(self) -> Iterator[None]:
        """Inside, the others wait until the first is through: they find in the cache what it has made."""
        if self.count > 1 and not self.first:
            dist.barrier()
        try:
            yield
        finally:
            if self.count > 1 and self.first:
                dist.barrier()


def local_rank() -> int | None:
    """Which of the processes on this machine this is; None where it was not started with others."""
    return int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ and "RANK" in os.environ else None


@contextmanager
def joined(device: str, parallel: str = "data") -> Iterator[Processes]:
    """Joins the processes that `torchrun` started together with this one, over NCCL on GPUs and gloo on CPUs.

    Raises:
        UserError: one process, where several are to share something else than a batch.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if local_rank() is None or count == 1:
        if parallel != "data":
            raise UserError(
                f"--parallel {parallel}: expected several processes, but got one; start them with: "
                f"torchrun --nproc-per-node N -m torchweld train ..."
            )
        yield Processes(device=device)
        return
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        if not on_gpu:  # one that fails before the others have found it would be a lost connection to them
            dist.barrier()
        yield Processes(dist.get_rank(), count, device, parallel)
    finally:
        dist.destroy_process_group()
