"""Two variants of torchweld beside each other: how their times compare, and the noise that the ratio stands in.

    python bench/ab.py A B [--rounds 30] [--part "backward, 4 x"] ...

A and B are each a folder that holds the package (a site-packages, or what `cmake --install --prefix` wrote), or a
compiled module `_cuda*.so` for the installed package. Each runs in a process of its own, which checks its results
against float64 first. A round calls A, B, A and B: B's two times over A's two are the ratio, and how far the two times
of one variant are apart is the noise. The measurements are those of wanted.py. Exit code 1 if one failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import wanted

import torchweld
from torchweld import backend
from torchweld.bench.harness import Clock, Settings, Work

DEFAULT = ("4 x 16 x 4096 x 128", "4 x 32 x 4096 x 64", "32768 x 4096", "one tensor")


Round = tuple[float, float, float, float]  # milliseconds of A, B, A and B


class Result(NamedTuple):
    """`noise`: in half of all rounds the two times of one variant differ by less."""

    a: float
    b: float
    ratio: float
    noise: float

    @property
    def verdict(self) -> str:
        if abs(self.ratio - 1) <= self.noise:
            return "within the noise"
        return "B is slower" if self.ratio > 1 else "B is faster"


def result(rounds: list[Round]) -> Result:
    apart = [[2 * abs(r[i] - r[i + 2]) / (r[i] + r[i + 2]) for r in rounds] for i in (0, 1)]
    return Result(
        a=median(t for r in rounds for t in r[::2]),
        b=median(t for r in rounds for t in r[1::2]),
        ratio=median((r[1] + r[3]) / (r[0] + r[2]) for r in rounds),
        noise=max(map(median, apart)),
    )


# ---- A process with one variant. It answers a line for each line.


def serve(sizes: wanted.Sizes, settings: Settings) -> int:
    names = [wanted.name_of(work) for work in wanted.works(sizes, settings)]
    calls: dict[str, Any] = {}
    tick = None
    kernels = backend.kernels.get(settings.device)
    origin = f"package {Path(torchweld.__file__).parent}, kernels {getattr(kernels, '__file__', 'none')}"
    wanted.say(works=names, origin=origin)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if "prepare" in asked:
                calls.clear()
                work = wanted.find(asked["prepare"], sizes, settings)  # made anew: it keeps what it measures
                calls.update(prepared(work, settings))
                tick = Clock(settings.device, work.wall)
                for call in (*calls.values(), *calls.values()):  # warm-up
                    tick(call, 1)
                wanted.say(calls=[*calls])
            else:
                assert tick is not None
                wanted.say(ms=tick(calls[asked["time"]], 1))
        except (AssertionError, RuntimeError) as error:
            wanted.say(fails=str(error).splitlines()[0])
    return 0


def prepared(work: Work, settings: Settings) -> dict[str, Any]:
    """Our calls, checked."""
    with backend.strict():
        work.check()
        found = {n: call for n, call in work.calls().items() if n.startswith("torchweld")}
    if work.direction == "forward":
        found = {"torchweld": found["torchweld"]}  # the other modes are those of the backward
    if settings.device == "cuda":
        torch.cuda.empty_cache()  # for the other process
    return found


# ---- The process that asks


class Variant:
    """A running process of one variant."""

    def __init__(self, path: Path, options: argparse.Namespace) -> None:
        command, environment = [sys.executable, __file__, "--serve", "--device", options.device], {**os.environ}
        if path.is_file():
            command += ["--kernels", str(path)]
        else:
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(path), environment.get("PYTHONPATH"))))
        command += ["--tiny"] if options.tiny else []
        self.path, self.limit = path, options.limit
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None
        self.lines = wanted.lines(self.process.stdout, options.limit)
        self.about = self._answer()

    def ask(self, **message: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps(message), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        for line in self.lines:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise RuntimeError(f"{self.path}: the process ended, exit code {self.process.wait()}")

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def compare(a: Variant, b: Variant, name: str, rounds: int) -> dict[str, Result]:
    """By call; empty where one of the two cannot be prepared."""
    answers = [variant.ask(prepare=name) for variant in (a, b)]
    if any("fails" in answer for answer in answers):
        for variant, answer in zip((a, b), answers, strict=True):
            print(f"{name}: {variant.path}: {answer.get('fails', 'right')}", flush=True)
        return {}
    found = {}
    for call in (c for c in answers[0]["calls"] if c in answers[1]["calls"]):
        times = [[variant.ask(time=call)["ms"] for variant in (a, b, a, b)] for _ in range(rounds)]
        found[call] = result([(r[0], r[1], r[2], r[3]) for r in times])
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", type=Path, metavar="A B", help="two folders or compiled modules")
    parser.add_argument("--part", nargs="+", metavar="PART", help="parts of names (default: one size of everything)")
    parser.add_argument("--rounds", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--limit", type=float, default=120, help="seconds to wait for an answer (default: %(default)s)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes for an emulator")
    parser.add_argument("--serve", action="store_true", help="measure here what standard input asks for")
    parser.add_argument("--kernels", type=Path, help="with --serve: this compiled module, not the installed one")
    options = parser.parse_args(arguments)
    if options.serve:
        if options.kernels is not None:
            wanted.use_kernels(options.kernels, options.device)
        return serve(wanted.TINY if options.tiny else wanted.FULL, Settings(device=options.device))
    if len(options.variants) != 2:
        parser.error(f"expected two variants, A and B, but got {len(options.variants)}")
    for path in options.variants:
        if not (path.is_file() or (path / "torchweld").is_dir()):
            parser.error(f"{path}: expected a compiled module, or a folder with torchweld in it")
    parts = options.part or ([] if options.tiny else DEFAULT)
    failed, running = 0, []
    try:
        running = [Variant(path, options) for path in options.variants]
        for letter, variant in zip("AB", running, strict=True):
            print(f"{letter}: {variant.about['origin']}")
        names = [n for n in running[0].about["works"] if n in running[1].about["works"]]
        print(f"{'':<62} {'A ms':>9} {'B ms':>9} {'B / A':>7} {'noise':>7}", flush=True)
        for name in names:
            if parts and not any(part in name for part in parts):
                continue
            found = compare(*running, name, options.rounds)
            failed += not found
            for call, each in found.items():
                label = name + call.removeprefix("torchweld").replace(":", ", ")
                times = f"{each.a:>9.4f} {each.b:>9.4f} {each.ratio:>7.3f} {each.noise:>7.3f}"
                print(f"{label:<62} {times}  {each.verdict}", flush=True)
    except wanted.queue.Empty:
        print(f"hangs: no answer within {options.limit:g} s")
        failed += 1
    finally:
        for variant in running:
            variant.close()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
