"""`python -m torchweld.testing.fuzz [op ...] --seconds N --seed S`: exit code 1 on a finding."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

from torchweld import _cpu
from torchweld.testing.fuzz.families import FAMILIES
from torchweld.testing.fuzz.report import Finding, Report

_STARTS = 600.0  # seconds for the first line of a child, which starts slowly on a busy machine
_HANGS = 60.0  # seconds without another line, after which the child is ended


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m torchweld.testing.fuzz", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"any of {', '.join(FAMILIES)} (default: all)")
    parser.add_argument("--seconds", type=float, default=60.0, help="for how long")
    parser.add_argument("--jobs", type=int, default=min(len(os.sched_getaffinity(0)), 8), help="child processes")
    parser.add_argument("--seed", type=int, default=0, help="from it and its number every case is drawn")
    parser.add_argument(
        "--isa", action="append", metavar="NAME", help="an instruction set (default: all that are here)"
    )
    parser.add_argument("--cases", type=int, help="stop after so many cases of each op")
    parser.add_argument("--case", type=int, metavar="K", help="only case K of each op")
    args = parser.parse_args(argv)
    args.jobs = 1 if args.case is not None else args.jobs
    for op in args.ops:
        if op not in FAMILIES:
            parser.error(f"op: expected any of {', '.join(FAMILIES)}, but got {op!r}")
    for isa in args.isa or ():
        if isa not in _cpu.available_isas():
            parser.error(f"--isa: expected any of {', '.join(_cpu.available_isas())} here, but got {isa!r}")
    return args


def run(job: int, args: argparse.Namespace, report: Report) -> None:
    """Runs the cases of one job in a child process. If the child ends too early, another goes on with the next case."""
    ops = args.ops or list(FAMILIES)
    following = dict.fromkeys(ops, job)
    deadline = time.monotonic() + args.seconds
    while (left := deadline - time.monotonic()) > 0:
        options = {
            "ops": ops,
            "isas": args.isa or _cpu.available_isas(),
            "seed": args.seed,
            "next": following,
            "stride": args.jobs,
            "seconds": left,
            "cases": args.cases,
            "case": args.case,
        }
        last = _child(options, report)
        if last is None or args.case is not None:
            return
        following[last[0]] = last[1] + args.jobs


def _child(options: dict[str, Any], report: Report) -> tuple[str, int] | None:
    """Runs one child. Returns the op and number of the case that ended it too early, or None."""
    command = [sys.executable, "-m", "torchweld.testing.fuzz.worker", json.dumps(options)]
    env = os.environ | {"TORCHWELD_CPU_ISA": options["isas"][0], "OMP_WAIT_POLICY": "passive"}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env) as child,
    ):
        assert child.stdout is not None
        op, number, isa, program, hung = "", 0, "", "", threading.Event()
        watchdog = _watchdog(child, hung, _STARTS)
        for line in child.stdout:
            watchdog.cancel()
            watchdog = _watchdog(child, hung, _HANGS)
            said = json.loads(line)
            if "case" in said:
                new, program = tuple(said["case"]), said["program"]
                report.cases[new[0], new[2]] += new != (op, number, isa)
                op, number, isa = new
                options["next"][op] = number + options["stride"]
            elif "skip" in said:
                report.skipped[said["skip"]] += 1
            else:
                report.add(Finding(**said["finding"]))
        watchdog.cancel()
        code = child.wait()
        if code == 0:
            return None
        errors.seek(0)
        text = errors.read()[-3000:]
        if not op:
            raise SystemExit(f"the child ended with code {code} before its first case:\n{text}")
        how = f"no end in {_HANGS:.0f} s" if hung.is_set() else _name(code)
        report.add(Finding(op, isa, number, f"{how}{_where(text)}", text, program))
        return op, number


def _watchdog(child: subprocess.Popen[str], hung: threading.Event, seconds: float) -> threading.Timer:
    def end() -> None:
        hung.set()
        child.kill()

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    return timer


def _name(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _where(text: str) -> str:
    """The first frame of torchweld in the output of faulthandler."""
    lines = [line.strip() for line in text.splitlines()]
    frames = [line for line in lines if line.startswith("File") and "torchweld" in line and "/testing/" not in line]
    return " in " + frames[0].rsplit("/", 1)[-1].replace('"', "") if frames else ""


def main(argv: list[str] | None = None) -> int:
    """Runs the children and prints their findings."""
    args = parse(argv)
    report = Report(args.seed)
    threads = [threading.Thread(target=run, args=(job, args, report)) for job in range(args.jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report.print()
    return 1 if report.findings or not report.cases else 0


if __name__ == "__main__":
    sys.exit(main())
