"""Attention over a sequence that is spread over processes, beside one process: time, memory, and what travels.

    python bench/context_parallel.py --processes 2 --tokens 8192

Every process has one thread. A round times one process alone, and then all of them together; ratios are of one round,
and the table shows their medians. "Work" is the ratio of processor time, one process to the busiest of all: what the
speedup is where every process has a core of its own and messages are hidden. Memory is the peak of a fresh process, of
inputs, outputs and gradients, as a share of that of one process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from torchweld import ops
from torchweld.distributed import all_to_all_attention, ring_attention

HEADS, DIM = 4, 64
METHODS: dict[str, Callable[..., Any]] = {
    "one": ops.attention,
    "ring": ring_attention,
    "all to all": all_to_all_attention,
}
MASKS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window 512": {"causal": True, "window": (512, None)},
    "all keys": {},
}


@contextmanager
def joined(rank: int, folder: str, count: int) -> Iterator[None]:
    """One of `count` processes, which ends with the block."""
    torch.set_num_threads(1)
    where = Path(folder, "rendezvous").as_uri()
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=count, timeout=timedelta(seconds=300))
    yield
    dist.barrier()
    os._exit(0)  # gloo's threads would outlive the interpreter


def run(method: str, mask: str, tokens: int, dtype: torch.dtype) -> None:
    """Forward and backward of `tokens` of this process."""
    leaves = [torch.randn(1, HEADS, tokens, DIM, dtype=dtype, requires_grad=True) for _ in range(3)]
    out: Tensor = METHODS[method](*leaves, **MASKS[mask])
    torch.autograd.grad(out, leaves, torch.ones_like(out))


def resident(name: str) -> float:
    line = next(t for t in Path("/proc/self/status").read_text().splitlines() if t.startswith(name))
    return float(line.split()[1]) * 1024


def memory(rank: int, folder: str, count: int, method: str, tokens: int, dtype: torch.dtype) -> None:
    """Leaves the bytes of each process in the folder."""
    with joined(rank, folder, count):
        run(method, "causal", 64, dtype)
        before = resident("VmRSS")
        run(method, "causal", tokens // count, dtype)
        Path(folder, f"{method} {rank}").write_text(str(resident("VmHWM") - before))


def speed(rank: int, folder: str, count: int, tokens: int, rounds: int, dtype: torch.dtype) -> None:
    """Prints the table."""
    with joined(rank, folder, count):
        for mask in MASKS:
            for method in list(METHODS)[1:]:
                times, works = [], []
                for _ in range(rounds):
                    seconds, busy = zip(*(timed(partial(run, *call, dtype), rank < n) for n, call in (
                        (1, ("one", mask, tokens)), (count, (method, mask, tokens // count))
                    )), strict=True)  # fmt: skip
                    times.append(seconds[0] / seconds[1])
                    works.append(busy[0] / busy[1])
                if rank == 0:
                    found = statistics.median(times), statistics.median(works)
                    print(f"{mask:10} {method:10} speedup {found[0]:4.2f}x, work {found[1]:4.2f}x", flush=True)


def timed(call: Callable[[], None], mine: bool) -> tuple[float, float]:
    """Seconds until all are through, and of the busiest processor."""
    dist.barrier()
    began, busy = time.perf_counter(), time.process_time()
    if mine:
        call()
    used = torch.tensor(time.process_time() - busy if mine else 0.0)
    dist.all_reduce(used, dist.ReduceOp.MAX)
    return time.perf_counter() - began, float(used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    count, dtype = args.processes, getattr(torch, args.dtype)
    peaks = {}
    for method in METHODS:
        with tempfile.TemporaryDirectory() as folder:
            several = 1 if method == "one" else count
            spawn(memory, (folder, several, method, args.tokens, dtype), nprocs=several)
            peaks[method] = max(float(path.read_text()) for path in Path(folder).glob(f"{method} *"))
            print(
                f"{method:10} memory {peaks[method] / 1e6:6.1f} MB, {peaks[method] / peaks['one']:4.2f} of one process"
            )
    with tempfile.TemporaryDirectory() as folder:
        spawn(speed, (folder, count, args.tokens, args.rounds, dtype), nprocs=count)


if __name__ == "__main__":
    main()
