"""`torchweld check`: every op on every backend and instruction set of this machine, held to float64."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from rich.table import Table

from torchweld import backend
from torchweld.console import console
from torchweld.errors import UserError

if TYPE_CHECKING:
    from torchweld.testing import Oracle

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def add_parser(subparsers: Subparsers) -> None:
    """Adds `torchweld check`."""
    parser = subparsers.add_parser(
        "check",
        help="hold every op on every backend here to float64",
        description="Runs the case list of every op, forward and every gradient, on every backend and CPU instruction "
        "set of this machine. The rule: no further from float64 than twice what torch is in the same dtype, plus one "
        "ulp. Exit code 1 if a result misses it.",
    )
    parser.add_argument("--op", nargs="+", metavar="OP", help="only these ops")
    parser.add_argument("--isa", default="all", metavar="NAME", help="one CPU instruction set (default: all)")
    parser.set_defaults(func=run)


@dataclass(frozen=True)
class Target:
    """A set of kernels, and the context in which calls run on it."""

    label: str
    device: str
    enter: Callable[[], AbstractContextManager[None]]


@dataclass
class Line:
    """One line of the table. `worst`: the largest ratio of an error to the allowed error, and its place."""

    cases: int = 0
    on_reference: int = 0
    worst: tuple[float, str] = (0.0, "")
    misses: list[str] = field(default_factory=list)


def targets(isa: str) -> list[Target]:
    """All sets of kernels of this machine, with the CPU instruction sets that `isa` names."""
    found = [Target("reference", "cpu", lambda: backend.use_backend("reference"))]
    if reason := backend.unavailable("cpu"):
        raise UserError(f"the CPU kernels, which every installation has, cannot be used: {reason}")
    names = backend.kernels["cpu"].available_isas()
    if isa != "all" and isa not in names:
        raise UserError(f"--isa: expected all or one of {', '.join(names)} here, but got {isa!r}")
    for name in reversed(names) if isa == "all" else [isa]:
        found.append(Target(f"cpu {name}", "cpu", lambda name=name: _on_isa(name)))  # type: ignore[misc]
    if backend.unavailable("cuda") is None:
        found.append(Target(f"cuda {torch.cuda.get_device_name()}", "cuda", lambda: backend.use_backend("cuda")))
    return found


@contextmanager
def _on_isa(name: str) -> Iterator[None]:
    module = backend.kernels["cpu"]
    before = module.isa()
    module.use_isa(name)
    try:
        with backend.use_backend("cpu"):
            yield
    finally:
        module.use_isa(before)


def _judge(line: Line, oracle: Oracle, target: Target) -> None:
    """Adds one case to a line."""
    line.cases += 1
    name = oracle.case.name
    try:
        with target.enter():
            try:
                with backend.strict():
                    verdicts = oracle.judge()
            except backend.NotServedError:
                line.on_reference += 1
                verdicts = oracle.judge()
    except Exception as error:  # any error of a kernel is a result of the check
        line.misses.append(f"{name}: {type(error).__name__}: {error}")
        return
    for v in verdicts:
        line.worst = max(line.worst, (v.ratio, f"{name}, {v.tensor}"))
        if v.problem is not None:
            line.misses.append(f"{name}, {v.tensor}: {v.problem}")


def check_op(op: str, where: list[Target]) -> dict[tuple[str, str], Line]:
    """The lines of one op, by the target's label and the dtype's name."""
    from torchweld.testing import Oracle, cases  # noqa: PLC0415  (`--help` need not wait for it)

    lines = {(t.label, _name(dtype)): Line() for t in where for dtype in _DTYPES}
    for device in dict.fromkeys(t.device for t in where):
        for case in cases(op):
            for dtype in case.dtypes:
                oracle = Oracle(case, dtype, device)
                for target in where:
                    if target.device == device:
                        _judge(lines[target.label, _name(dtype)], oracle, target)
    return lines


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run(args: argparse.Namespace) -> int:
    """Prints the table and every miss. Returns 1 if there is a miss."""
    from torchweld.testing import ops  # noqa: PLC0415

    known = list(ops())
    for op in args.op or ():
        if op not in known:
            raise UserError(f"--op: expected any of {', '.join(known)}, but got {op!r}")
    where, out = targets(args.isa), console()
    table = Table("op", "kernels", "dtype", "cases", "worst error / allowed", "at", "")
    misses: list[str] = []
    for op in args.op or known:
        with out.status(f"checking {op}"):
            lines = check_op(op, where)
        for (label, dtype), line in lines.items():
            cases = str(line.cases) + (f" ({line.on_reference} on the reference)" if line.on_reference else "")
            verdict = f"[red]{len(line.misses)} wrong" if line.misses else "[green]ok"
            table.add_row(op, label, dtype, cases, f"{line.worst[0]:.2f}", line.worst[1], verdict)
            misses += [f"[{op}] {label} {dtype}: {miss}" for miss in line.misses]
        table.add_section()
    out.print(table)
    for miss in misses:
        out.print(miss, style="red", markup=False)
    out.print(f"{len(misses)} wrong" if misses else "all results within the rule", style="red" if misses else "green")
    return 1 if misses else 0
