"""Runs a check in several processes over gloo."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

WORLD = 2
# The processes are forks of one that has imported these, which takes a process of its own seconds.
PRELOADED = ["torch", "torch._dynamo", "torch.distributed.tensor", "torchweld", "torchweld.testing.cases", "pytest"]
needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no torch.distributed over gloo"
)


def in_two_processes(check: Callable[[int, str], None]) -> None:
    """check(rank, folder) in each of two processes of one thread, which share a temporary folder."""
    in_processes(check, WORLD)


def in_processes(check: Callable[[int, str], None], count: int, timeout: float = 120) -> None:
    """The same in `count` processes. A process waits `timeout` seconds at most for the others."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.set_forkserver_preload(PRELOADED)
        start_processes(_process, (folder, check, count, timeout), nprocs=count, start_method="forkserver")


def _process(rank: int, folder: str, check: Callable[[int, str], None], count: int, timeout: float) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=timeout)
    store = dist.FileStore(str(Path(folder, "rendezvous")), count)  # type: ignore[attr-defined]  # documented
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=limit)
    # Gloo's mesh is whole for a process before it is for the others, which fail if that one leaves at once.
    store.set(f"connected {rank}", "")
    store.wait([f"connected {other}" for other in range(count)], limit)
    check(rank, folder)
    dist.barrier()
    dist.destroy_process_group()
    # Device meshes keep gloo's threads alive, and an interpreter that ends beside them can abort: "terminate called".
    os._exit(0)
