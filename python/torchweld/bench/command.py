"""The options of `torchweld bench`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from torchweld import backend
from torchweld.console import console
from torchweld.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from torchweld.bench.harness import Settings, Work
    from torchweld.bench.report import Row

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

NORMS = ("layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm")
ACTIVATIONS = ("gelu", "dropout", "swiglu", "geglu", "rotary_embedding")
OPTIMIZERS = ("adamw", "sgd")
OPS = (
    "attention",
    "paged_attention",
    *NORMS,
    *ACTIVATIONS,
    "linear_cross_entropy",
    *OPTIMIZERS,
    "transformer_layer",
    "overhead",
)
SWEEP, COMPARE = "sweep", "compare"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DIRECTIONS = ("forward", "backward", "step")


def add_parser(subparsers: Subparsers) -> None:
    """Adds `torchweld bench`."""
    parser = subparsers.add_parser(
        "bench",
        help="time each op beside torch, after checking it",
        description="Times each op beside torch on this machine: results are held to float64 first, then all providers "
        "are called in turn, launch by launch. `of limit` is the share of what a plain copy (or a matrix product) "
        "reaches in the same rounds. `torchweld bench compare OLD NEW` reads two files of --json and names what became "
        "slower, beyond the noise of both; the exit code is then 1.",
    )
    parser.add_argument(
        "op",
        nargs="*",
        metavar="OP",
        help=f"any of {', '.join(OPS)} (default: all); or {SWEEP} alone: calls of all sizes beside torch, the "
        f"slowest and the median of each op, and for --plot a heat map; or {COMPARE} OLD NEW",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--dtype", nargs="+", choices=_DTYPES, default=["float32", "bfloat16"], help="default: float32 and bfloat16"
    )
    parser.add_argument("--direction", nargs="+", choices=_DIRECTIONS, default=_DIRECTIONS, help="default: all")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, shorter timing")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="beside torch.compile too (default: on a GPU; on a CPU each size costs a minute of compiling)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the speedups here (.png, .svg or .pdf)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a page for a browser here (.html)")
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="write the columns of Liger-Kernel's benchmark data here"
    )
    parser.add_argument(
        "--from",
        nargs="+",
        type=Path,
        dest="files",
        metavar="FILE",
        help="measure nothing: --report, --csv, --plot and --json of these files of --json",
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="measure nothing: FILE, of --json, as a table")
    parser.set_defaults(func=run)


def _check(args: argparse.Namespace) -> None:
    """Checks all options before the measurements, which take minutes."""
    from torchweld.bench.report import plotter  # noqa: PLC0415  (`--help` need not wait for it)

    if args.files is not None and args.op:
        raise UserError(f"--from: expected no OP beside it, for it measures nothing, but got {args.op[0]}")
    if args.files is not None and not any(path for _, path in _outputs(args)):
        raise UserError("--from: expected what to write, but got none; add --report FILE.html, --csv, --plot or --json")
    for op in args.op:
        if op not in OPS and args.op != [SWEEP]:
            raise UserError(
                f"bench: expected any of {', '.join(OPS)}, or {COMPARE} OLD NEW, or {SWEEP} alone, but got {op!r}"
            )
    if args.device == "cuda" and (reason := backend.unavailable("cuda")):
        raise UserError(f"--device cuda: {reason}")
    if args.threads is not None and not 1 <= args.threads <= 4096:
        raise UserError(f"--threads: expected a number from 1 to 4096, but got {args.threads}")
    for option, path in _outputs(args):
        if path is None:
            continue
        folder = path.absolute().parent
        if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UserError(f"{option} {path}: expected a file in a folder that exists and can be written")
    if args.report is not None and args.report.suffix not in (".html", ".htm"):
        raise UserError(f"--report {args.report}: expected a name that ends in .html")
    if args.plot is not None:
        plotter()
        if args.plot.suffix not in (".png", ".svg", ".pdf"):
            raise UserError(f"--plot {args.plot}: expected a name that ends in .png, .svg or .pdf")


def _outputs(args: argparse.Namespace) -> tuple[tuple[str, Path | None], ...]:
    return ("--json", args.json), ("--plot", args.plot), ("--report", args.report), ("--csv", args.csv)


def sources() -> dict[str, Callable[[Settings], Iterator[Work]]]:
    """The measurements of each op."""
    from torchweld.bench.activations import activations  # noqa: PLC0415
    from torchweld.bench.attention import attention, paged_attention  # noqa: PLC0415
    from torchweld.bench.layer_norm import norms  # noqa: PLC0415
    from torchweld.bench.linear_cross_entropy import linear_cross_entropy  # noqa: PLC0415
    from torchweld.bench.optimizers import optimizers  # noqa: PLC0415
    from torchweld.bench.overhead import overhead  # noqa: PLC0415
    from torchweld.bench.transformer_layer import transformer_layer  # noqa: PLC0415

    return {
        "attention": attention,
        "paged_attention": paged_attention,
        **{op: partial(norms, op) for op in NORMS},
        **{op: partial(activations, op) for op in ACTIVATIONS},
        "linear_cross_entropy": linear_cross_entropy,
        **{op: partial(optimizers, op) for op in OPTIMIZERS},
        "transformer_layer": transformer_layer,
        "overhead": overhead,
    }


def run(args: argparse.Namespace) -> int:
    """Measures and prints. Returns 1 if a result was wrong; wrong results are not timed."""
    from torchweld.bench import report  # noqa: PLC0415
    from torchweld.bench.harness import Settings, measure, wrong  # noqa: PLC0415
    from torchweld.memory import keep_memory  # noqa: PLC0415

    if args.op[:1] == [COMPARE]:
        return _compare(args)
    if args.markdown is not None:
        print(report.markdown(rows := report.read(args.markdown)))
        if args.plot is not None:
            report.plot(rows, args.plot)
        return 0
    _check(args)
    if args.files is not None:
        rows = [row for path in args.files for row in report.read(path)]
        measured = max(path.stat().st_mtime for path in args.files)
        _write(args, rows, [path.name for path in args.files], datetime.fromtimestamp(measured))
        return 0
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    settings = Settings(
        device=args.device,
        dtypes=tuple(_DTYPES[name] for name in args.dtype),
        directions=tuple(args.direction),
        quick=args.quick,
        compile=args.device == "cuda" if args.compile is None else args.compile,
        seconds=0.3 if args.quick else 2.0,
    )
    kept = keep_memory()
    out, began = console(), datetime.now()
    here = [f"a run of {began:%Y-%m-%d %H:%M}"]
    out.print(f"memory, for all providers: {kept}")
    if args.op == [SWEEP]:
        _write(args, _sweep(settings, args, out), here, began)
        return 0
    rows, skipped = [], dict[str, None]()
    for op in args.op or OPS:
        found = []
        for work in sources()[op](settings):
            with out.status(f"{op} {work.direction} {work.case}"):
                try:
                    found += measure(work, settings)
                except backend.NotServedError as error:
                    if str(error) not in skipped:
                        out.print(f"not timed: {error}", style="yellow", markup=False)
                    skipped[str(error)] = None
                except AssertionError as error:
                    rows.append(wrong(work, settings, str(error)))
                    out.print(f"wrong, not timed: {error}", style="red", markup=False)
        if found:
            out.print(report.table(found))
        rows += found
        if args.json is not None:
            report.write(rows, args.json)
    _write(args, rows, here, began, [*skipped])
    return 1 if len(report.timed(rows)) < len(rows) else 0


def _write(
    args: argparse.Namespace, rows: list[Row], sources: Sequence[str], when: datetime, notes: Sequence[str] = ()
) -> None:
    """Writes the rows in each form that the options ask for."""
    from torchweld.bench import csv_file, page, report, sweep  # noqa: PLC0415

    if args.json is not None:
        report.write(rows, args.json)
    if args.plot is not None:
        (sweep.heat_map if args.op == [SWEEP] else report.plot)(rows, args.plot)
    if args.csv is not None:
        csv_file.write(rows, args.csv, when)
    if args.report is not None:
        page.write(rows, args.report, sources, notes)


def _compare(args: argparse.Namespace) -> int:
    """Prints what changed beyond the noise. Returns 1 if anything became slower or wrong."""
    from torchweld.bench import compare, report  # noqa: PLC0415

    if len(args.op) != 3:
        raise UserError(f"bench compare: expected two files of --json, OLD and NEW, but got {len(args.op) - 1}")
    old, new = (report.read(Path(name)) for name in args.op[1:])
    changes, out = compare.compare(old, new), console()
    for line in compare.differences(old, new):
        out.print(f"not the same, {line}", style="yellow", markup=False)
    counts = {name: sum(change.verdict == name for change in changes) for name in ("slower", "faster", "wrong")}
    if any(counts.values()):
        out.print(compare.table(changes))
    text = ", ".join(f"{count} {name}" for name, count in counts.items())
    out.print(f"{len(changes)} measurements in both files: {text}, the others within the noise")
    for name, count in zip(args.op[1:], compare.alone(old, new), strict=True):
        if count:
            out.print(f"not compared: {count} that only {name} has", style="yellow", markup=False)
    return 1 if compare.failed(changes) else 0


def _sweep(settings: Settings, args: argparse.Namespace, out: Console) -> list[Row]:
    """Measures all cells and prints their summary."""
    from torchweld.bench import sweep  # noqa: PLC0415

    rows: list[Row] = []
    with out.status("sweep") as status:
        for found in sweep.sweep(settings):
            rows += found
            status.update(f"sweep: {found[0]['op']} {found[0]['direction']} {found[0]['case']['name']}")
    out.print(sweep.summary(rows))
    return rows
