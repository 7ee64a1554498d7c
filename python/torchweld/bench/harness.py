"""How a measurement is made: check each result, then time all providers launch by launch, side by side.

A `Work` is one op at one size in one direction. Its providers (torchweld, torch, ...) are called in turn, round after
round. Each round starts with the next provider, so that other load on the machine hits all of them alike. A round ends
with the limit: a copy of as many bytes, or a matrix product in the same dtype. Warm-up ends after a time. Results are
medians with the 20th and 80th percentiles. The timed call allocates its outputs, as a user's call does. The command
calls `torchweld.keep_memory`, so the times do not contain page faults of the system's allocator.

On a GPU, CUDA events time a launch. Large writes before it flush the second-level cache. The host queues the launch
before they end, so the events do not see Python. `wall=True` takes the host's clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from torchweld.environment import device_name, versions

Call = Callable[[], object]


@dataclass(frozen=True)
class Settings:
    """The options of the command line. `seconds`: of timing per work."""

    device: str = "cpu"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    directions: tuple[str, ...] = ("forward", "backward", "step")
    quick: bool = False
    compile: bool = False
    seconds: float = 2.0


@dataclass
class Work:
    """One measurement. `check` returns each provider's largest error against float64, and raises if ours is wrong.

    `calls` makes the timed calls when the measurement begins. `case` has a name and the sizes. The limit is a copy
    where `bytes` is given, the bytes that the op must move, and a product where `flops` is given. `repeats`: calls per
    sample, where one call is too short for the clock.
    """

    op: str
    direction: str
    dtype: torch.dtype
    case: dict[str, Any]
    calls: Callable[[], dict[str, Call]]
    check: Callable[[], dict[str, float]] = dict
    bytes: float | None = None
    flops: float | None = None
    repeats: int = 1
    wall: bool = False


@dataclass(frozen=True)
class Limit:
    """A call that only moves `bytes`, or only multiplies with `flops`."""

    call: Call
    amount: float


@lru_cache(maxsize=1)
def _copy(size: int, device: str) -> Limit:
    source, target = (torch.zeros(max(size, 1), dtype=torch.uint8, device=device) for _ in range(2))
    return Limit(lambda: target.copy_(source), 2.0 * size)


@lru_cache(maxsize=1)
def _matmul(dtype: torch.dtype, device: str) -> Limit:
    n = 8192 if device == "cuda" else 1024
    a, b, out = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))  # a GPU is faster on zeros and ones
    return Limit(lambda: torch.mm(a, b, out=out), 2.0 * n**3)


def _limit(work: Work, device: str) -> Limit | None:
    if work.bytes is not None:
        # As many bytes as the op moves, half of them read. Sizes far beyond the caches are cut.
        return _copy(min(int(work.bytes / 2), 1 << 28), device)
    return _matmul(work.dtype, device) if work.flops is not None else None


# Of 512 MB each. Together they last 0.5 ms at 4 TB/s: longer than the host takes to queue a backward by autograd.
_FLUSHES = 4


class Clock:
    """Milliseconds of one call on the device."""

    def __init__(self, device: str, wall: bool) -> None:
        self.cuda, self.wall = device == "cuda", wall
        if self.cuda:
            self.flush = torch.empty(1 << 29, dtype=torch.uint8, device=device)
            self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call: Call, repeats: int) -> float:
        if self.cuda:
            for _ in range(_FLUSHES):
                self.flush.zero_()
            if not self.wall:
                self.begin.record()
                for _ in range(repeats):
                    call()
                self.end.record()
                self.end.synchronize()
                return self.begin.elapsed_time(self.end) / repeats
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        if self.cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3 / repeats


def interleave(
    calls: dict[str, Call], clock: Callable[[Call, int], float], seconds: float, repeats: int = 1
) -> dict[str, list[float]]:
    """Samples by name: rounds of one timed call each until `seconds` have passed, at least 5 and at most 500 rounds."""
    for call in calls.values():  # warm-up, by time
        start, count = time.perf_counter(), 0
        while count < 2 or time.perf_counter() - start < seconds / 20:
            clock(call, 1)
            count += 1
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names, start = list(calls), time.perf_counter()
    for turn in range(500):
        if turn >= 5 and time.perf_counter() - start > seconds:
            break
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            samples[name].append(clock(calls[name], repeats))
    return samples


def _quantile(samples: list[float], q: float) -> float:
    return float(torch.tensor(samples, dtype=torch.float64).quantile(q))


def measure(work: Work, settings: Settings) -> list[dict[str, Any]]:
    """Checks, then times. Returns a row for each provider, as `bench --json` writes them."""
    errors = work.check()
    limit = _limit(work, settings.device)
    ours_and_theirs = work.calls()
    calls = ours_and_theirs | ({} if limit is None else {"limit": limit.call})
    samples = interleave(calls, Clock(settings.device, work.wall), settings.seconds, work.repeats)
    medians = {name: _quantile(each, 0.5) for name, each in samples.items()}
    rows = []
    for name in ours_and_theirs:
        amount = work.bytes if work.bytes is not None else work.flops
        share = None
        if limit is not None and amount is not None:
            share = (amount / medians[name]) / (limit.amount / medians["limit"])
        measured = {
            "median_ms": medians[name],
            "p20_ms": _quantile(samples[name], 0.2),
            "p80_ms": _quantile(samples[name], 0.8),
            "gflops": None if work.flops is None else work.flops / medians[name] / 1e6,
            "gbytes_per_s": None if work.bytes is None else work.bytes / medians[name] / 1e6,
            "share_of_limit": share,
            "speedup_vs_torch": medians["torch"] / medians[name] if "torch" in medians else None,
            "max_error": errors.get(name),
            "torch_max_error": errors.get("torch"),
        }
        rows.append(_row(work, settings, name, measured))
    return rows


def wrong(work: Work, settings: Settings, reason: str) -> dict[str, Any]:
    """The row of a result that broke the accuracy rule: without times, and with the reason."""
    return {**_row(work, settings, "torchweld", {}), "wrong": reason}


def _row(work: Work, settings: Settings, provider: str, measured: dict[str, float | None]) -> dict[str, Any]:
    names = ("median_ms", "p20_ms", "p80_ms", "gflops", "gbytes_per_s", "share_of_limit", "speedup_vs_torch")
    return {
        "op": work.op,
        "direction": work.direction,
        "provider": provider,
        "device": device_name(settings.device),
        "dtype": str(work.dtype).removeprefix("torch."),
        "case": work.case,
        **dict.fromkeys((*names, "max_error", "torch_max_error")),
        **measured,
        "versions": versions(),
    }
