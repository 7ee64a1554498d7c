"""The most wanted timings of a GPU, beside torch, the most important first; each row is printed as it is measured.

    python bench/wanted.py [--json rows.jsonl] [--seconds 0.3] [--limit 60] [PART ...]

Rows are appended to the file one by one, a JSON object a line, which `torchweld bench --report` and `compare` read.
The measurements run in a process of their own. One that never ends, or that leaves the device unusable, is named, and a
new process goes on with the next. PART: parts of names, such as "backward" or "x 256". Exit code 1 if one was wrong,
hung or failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch

from torchweld import backend
from torchweld.bench import report
from torchweld.bench.attention import attention_case, square
from torchweld.bench.harness import Settings, Work, measure, wrong
from torchweld.bench.layer_norm import norm_case
from torchweld.bench.optimizers import optimizer_steps

UNUSABLE = 3  # exit code of a process whose device takes no further calls


class Sizes(NamedTuple):
    """What is measured. Attention has `tokens` rows in all and heads of `width` columns together."""

    tokens: int
    width: int
    lengths: tuple[int, ...]
    dims: tuple[int, ...]
    rows: int
    cols: tuple[int, ...]
    parameters: int


FULL = Sizes(16384, 2048, (4096, 16384, 1024), (128, 64, 256), 32768, (4096, 768, 8192), 1_000_000_000)
TINY = Sizes(70, 64, (70,), (64,), 5, (96,), 5000)  # for an emulator


def works(sizes: Sizes, settings: Settings) -> Iterator[Work]:
    """First one length and one width of everything."""
    later = (sizes.lengths[1:2], sizes.cols[1:], sizes.lengths[2:])
    yield from _attention(sizes, sizes.lengths[:1], settings)
    yield from _norms(sizes, sizes.cols[:1], settings)
    for dtype in (torch.float32, torch.bfloat16):
        yield from optimizer_steps("adamw", "one tensor", [torch.Size([sizes.parameters])], dtype, settings)
    yield from _attention(sizes, later[0], settings)
    yield from _norms(sizes, later[1], settings)
    yield from _attention(sizes, later[2], settings)


def _attention(sizes: Sizes, lengths: tuple[int, ...], settings: Settings) -> Iterator[Work]:
    for rows in lengths:
        for dim in sizes.dims:
            for causal in (False, True):
                case = square(sizes.tokens, sizes.width, rows, dim, causal)
                yield from attention_case(case, torch.bfloat16, settings)


def _norms(sizes: Sizes, widths: tuple[int, ...], settings: Settings) -> Iterator[Work]:
    for cols in widths:
        for op in ("layer_norm", "rms_norm"):
            yield from norm_case(op, sizes.rows, cols, torch.bfloat16, settings)


def name_of(work: Work) -> str:
    return f"{work.op} {work.direction}, {work.case['name']}, {str(work.dtype).removeprefix('torch.')}"


def find(name: str, sizes: Sizes, settings: Settings) -> Work:
    return next(work for work in works(sizes, settings) if name_of(work) == name)


def use_kernels(library: Path, device: str, label: str = "taken") -> None:
    """Takes the kernels for a device from this compiled module, in place of the installed ones."""
    name = library.name.split(".")[0]
    spec = importlib.util.spec_from_file_location(f"{label}.{name}", library)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    backend.kernels[device] = module


# ---- The process that measures. It says what it does on its standard output, a JSON object a line.


def say(**message: object) -> None:
    print(json.dumps(message), flush=True)


def measure_from(start: int, parts: list[str], sizes: Sizes, settings: Settings) -> int:
    for number, work in enumerate(works(sizes, settings)):
        name = name_of(work)
        if number < start or (parts and not any(part in name for part in parts)):
            continue
        say(begins=number, name=name)
        try:
            say(rows=measure(work, settings))
        except AssertionError as error:
            say(rows=[wrong(work, settings, str(error))])
        except backend.NotServedError as error:
            say(note=f"not timed: {error.reason}")
        except RuntimeError as error:  # memory, or a torch without one of its kernels
            say(fails=f"error: {str(error).splitlines()[0]}")
            try:
                if settings.device == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.synchronize()
            except RuntimeError:
                return UNUSABLE
    return 0


# ---- The process that watches it


def lines(stream: TextIO, seconds: float) -> Iterator[str]:
    """Lines as they come; raises queue.Empty when none comes for so long."""
    found: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in stream:
            found.put(line)
        found.put(None)

    threading.Thread(target=read, daemon=True).start()
    while (line := found.get(timeout=seconds)) is not None:
        yield line


def show(row: report.Row, out: TextIO) -> None:
    if reason := row.get(report.WRONG):
        print(f"{row['op']} {row['direction']}, {row['case']['name']}: WRONG, {reason}", file=out, flush=True)
        return
    op, case, dtype, provider, ms, rate, share, ratio, error = report.cells(row)
    line = f"{op:<19} {case:<26} {dtype:<9} {provider:<18} {ms:<26} {rate:>15} {share:>5} {ratio:>6} {error:>8}"
    print(line.rstrip(), file=out, flush=True)


def watch(command: list[str], json_lines: TextIO | None, seconds: float, out: TextIO) -> int:
    """Runs `command --from N` until all is measured. Returns the number of measurements that came to nothing."""
    number, failed = -1, 0
    while True:
        begun, name = number, "the start"
        with subprocess.Popen([*command, "--from", str(number + 1)], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                for line in lines(process.stdout, seconds):
                    if not line.startswith("{"):  # a library's own words
                        print(line, end="", file=out, flush=True)
                        continue
                    message = json.loads(line)
                    number, name = message.get("begins", number), message.get("name", name)
                    for row in message.get("rows", ()):
                        show(row, out)
                        failed += report.WRONG in row
                        if json_lines is not None:
                            print(json.dumps(row), file=json_lines, flush=True)
                    for text in (message[key] for key in ("note", "fails") if key in message):
                        print(f"{name}: {text}", file=out, flush=True)
                    failed += "fails" in message
            except queue.Empty:
                process.kill()
                print(f"{name}: hangs, nothing for {seconds:g} s", file=out, flush=True)
                failed += 1
            code = process.wait()
        if code == 0:
            return failed
        if code not in (UNUSABLE, -9):
            print(f"{name}: exit code {code}", file=out, flush=True)
            failed += 1
        if number == begun:  # it ended before it measured anything
            return failed or 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="parts of names; default: all measurements")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows here")
    parser.add_argument("--seconds", type=float, default=0.3, help="of timing per measurement (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=60, help="seconds that one may take (default: %(default)s)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kernels", type=Path, metavar="FILE", help="this compiled module, not the installed one")
    parser.add_argument("--tiny", action="store_true", help="sizes for an emulator")
    parser.add_argument("--from", type=int, dest="start", metavar="N", help="measure from the N-th on in this process")
    options = parser.parse_args(arguments)
    if options.start is not None:
        if options.kernels is not None:
            use_kernels(options.kernels, options.device)
        settings = Settings(device=options.device, seconds=options.seconds)
        return measure_from(options.start, options.parts, TINY if options.tiny else FULL, settings)
    command = [sys.executable, __file__, *(sys.argv[1:] if arguments is None else arguments)]
    if options.json is None:
        return int(bool(watch(command, None, options.limit, sys.stdout)))
    with options.json.open("a", encoding="utf-8") as file:
        return int(bool(watch(command, file, options.limit, sys.stdout)))


if __name__ == "__main__":
    sys.exit(main())
