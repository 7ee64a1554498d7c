"""The child process: tries cases one by one, and writes each case and its result to standard output.

A line before each case, so that the parent knows which one ended the process: {"case": [op, number, isa], "program":
...}. A line for a finding or a skip. The parent's line of arguments is this module's only input.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from torchweld import _cpu
from torchweld.testing.fuzz.draw import Draw
from torchweld.testing.fuzz.families import FAMILIES
from torchweld.testing.fuzz.report import Finding
from torchweld.testing.fuzz.trial import Skip, Trial, program, signature

_MEMORY = 8 << 30  # bytes of address space beyond what is in use: a call that asks for more gets an error
_SHRINKING = 10.0, 0.25  # seconds at most for the search of a smaller case that fails alike; the share of all time


def _failure(trial: Trial) -> Exception | None:
    """The failure of a trial; None if there is none, or nothing to try."""
    try:
        trial.check()
    except Skip:
        return None
    except Exception as error:
        return error
    return None


def shrunk(trial: Trial, kind: str, seconds: float, begin: Callable[[Trial], None] = lambda _: None) -> Trial:
    """A smaller trial that fails in the same way, or the trial itself if none is found in time."""
    deadline = time.monotonic() + seconds
    while True:
        for smaller in trial.smaller():
            if time.monotonic() > deadline:
                return trial
            begin(smaller)
            error = _failure(smaller)
            if error is not None and signature(error) == kind:
                trial = smaller
                break
        else:
            return trial


@dataclass
class Worker:
    """Runs every `stride`-th case of the families `ops`, on all of `isas`; `next` holds the next number of each op."""

    ops: list[str]
    isas: list[str]
    seed: int
    next: dict[str, int]
    stride: int
    say: Callable[[dict[str, Any]], None]
    seconds: float
    kinds: set[tuple[str, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.shrinking = _SHRINKING[1] * self.seconds

    def run(self, cases: int | None) -> None:
        """Runs until the time is over, each op for as long as the others, or until each op has had enough cases."""
        deadline = time.monotonic() + self.seconds
        spent = dict.fromkeys(self.ops, 0.0)
        while (now := time.monotonic()) < deadline:
            waiting = [op for op in self.ops if cases is None or self.next[op] < cases]
            if not waiting:
                return
            op = min(waiting, key=spent.__getitem__)
            self.one(op, self.next[op])
            self.next[op] += self.stride
            spent[op] += time.monotonic() - now

    def one(self, op: str, number: int) -> None:
        """Case `number` of `op` on every instruction set."""
        try:
            trial = FAMILIES[op](Draw(self.seed, number, op))
            for isa in self.isas:
                _cpu.use_isa(isa)
                self._say_case(op, number, isa, trial)
                torch.manual_seed(number)
                try:
                    trial.check()
                except Skip:
                    raise
                except Exception as error:
                    self._found(op, number, isa, trial, error)
        except Skip:
            self.say({"skip": op})

    def _say_case(self, op: str, number: int, isa: str, trial: Trial) -> None:
        self.say({"case": [op, number, isa], "program": program(trial, isa)})

    def _found(self, op: str, number: int, isa: str, trial: Trial, error: Exception) -> None:
        kind, text = signature(error), ""
        if (op, kind) not in self.kinds:  # more of the same kind tell nothing new
            self.kinds.add((op, kind))
            before = time.monotonic()
            limit = min(_SHRINKING[0], self.shrinking)
            trial = shrunk(trial, kind, limit, lambda smaller: self._say_case(op, number, isa, smaller))
            self.shrinking -= time.monotonic() - before
            error = _failure(trial) or error
            text = program(trial, isa)
        self.say({"finding": asdict(Finding(op, isa, number, kind, str(error)[:1000], text))})


def _limit_memory() -> None:
    """Limits memory: a call that asks for much more than is in use gets an error."""
    page = resource.getpagesize()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * page if Path("/proc/self/statm").exists() else 0
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))


def main(options: dict[str, Any]) -> None:
    faulthandler.enable()
    # The output of a case must not mix with the lines of the protocol.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _limit_memory()
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")
    cases, case = options.pop("cases"), options.pop("case")
    worker = Worker(**options, say=lambda line: print(json.dumps(line), file=out, flush=True))
    if case is None:
        worker.run(cases)
    else:
        for op in worker.ops:
            worker.one(op, case)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
