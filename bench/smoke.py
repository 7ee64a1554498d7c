"""Which kernel families give right results on this GPU: each in a process of its own, with a time limit.

    python bench/smoke.py [--seconds 30] [--jobs 8] [FAMILY ...]

A row is printed as soon as its process ends: right, "wrong by" how many times what is allowed, hangs, or an error. A
kernel that never ends, or that leaves the device unusable, takes no other family with it. Exit code 1 unless all are
right.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from torchweld import backend
from torchweld.testing import Case, Oracle
from torchweld.testing.attention import AttentionCase
from torchweld.testing.cases import ops


class Check(NamedTuple):
    """One call and, unless `inference`, its gradients."""

    case: Case
    dtype: torch.dtype
    inference: bool = False
    deterministic: bool = True


def attention(dim: int, queries: int = 300, keys: int = 700, **flags: object) -> AttentionCase:
    name = f"{queries} x {keys}, D {dim}"
    return AttentionCase(name=name, regime="smoke", queries=queries, keys=keys, dim=dim, **flags)  # type: ignore[arg-type]


def families() -> dict[str, list[Check]]:
    """By name, in the order in which a first run wants to know them: attention, then the other ops."""
    found: dict[str, list[Check]] = {}
    modified = {"causal": True, "softcap": 5.0, "sinks": True, "dropout": 0.25}
    for dim in (64, 128, 256):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            kind = f"D {dim}, {str(dtype)[6:]}"
            plain, other = attention(dim), attention(dim, **modified)
            found[f"attention forward, {kind}"] = [Check(each, dtype, inference=True) for each in (plain, other)]
            found[f"attention backward, {kind}"] = [Check(each, dtype) for each in (plain, other)]
            biased = attention(dim, bias=(1, 2, 300, 700))
            found[f"attention dbias, {kind}"] = [Check(biased, dtype)]
            if dtype != torch.float32 and dim <= 128:
                loose = dataclasses.replace(plain, deterministic=False)
                found[f"attention atomics, {kind}"] = [Check(loose, dtype, deterministic=False)]
        found[f"attention decode, D {dim}"] = [Check(attention(dim, queries=1), torch.bfloat16, inference=True)]
    for op, cases in ops().items():
        if op == "attention":
            continue
        for dtype in (torch.float32, torch.bfloat16):
            checks = [Check(each, dtype) for each in cases if dtype in each.dtypes]
            found[f"{op}, {str(dtype)[6:]}"] = checks
    return {name: checks for name, checks in found.items() if checks}


def verdict(checks: list[Check], device: str) -> str:
    """right, or the largest error as a multiple of what is allowed, or that no call is served."""
    worst, served = 0.0, 0
    for check in checks:
        oracle = Oracle(check.case, check.dtype, device, inference=check.inference)
        try:
            found = oracle.judge(poison=check.deterministic)
        except backend.NotServedError:
            continue
        served += 1
        worst = max([worst, *(each.ratio for each in found)])
    if served == 0:
        return "no kernels"
    return "right" if worst <= 1 else f"wrong by {worst:.3g}"


def outcome(command: list[str], seconds: float) -> str:
    """What a process that prints a verdict comes to."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return "hangs"
    if run.returncode != 0:
        lines = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
        return f"error: {lines[-1]}"
    return run.stdout.strip().splitlines()[-1]


def rows(names: list[str], device: str, seconds: float, jobs: int) -> Iterator[tuple[str, str]]:
    def ask(name: str) -> tuple[str, str]:
        started = time.perf_counter()
        found = outcome([sys.executable, __file__, "--device", device, "--here", name], seconds)
        print(f"{name:<44} {time.perf_counter() - started:5.1f} s  {found}", flush=True)
        return name, found

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(ask, names)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="names, or parts of names; default: all")
    parser.add_argument("--seconds", type=float, default=30, help="the limit of each process (default: 30)")
    parser.add_argument("--jobs", type=int, default=8, help="processes at a time (default: 8)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--here", metavar="FAMILY", help="check one family in this process and print its verdict")
    options = parser.parse_args(arguments)
    every = families()
    if options.here is not None:
        with backend.strict():
            print(verdict(every[options.here], options.device))
        return 0
    names = [n for n in every if not options.families or any(part in n for part in options.families)]
    if not names:
        parser.error(f"no family has a name with {', '.join(options.families)}; there are: {'; '.join(every)}")
    found = dict(rows(names, options.device, options.seconds, options.jobs))
    bad = [name for name, result in found.items() if result not in ("right", "no kernels")]
    print(f"{len(names) - len(bad)} of {len(names)} families are right" + (f"; not: {', '.join(bad)}" if bad else ""))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
