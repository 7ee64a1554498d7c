"""Rows of `bench`: in a file, as a table on the terminal, as Markdown, and as a plot."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from torchweld.errors import UserError
from torchweld.files import write_text

Row = dict[str, Any]
KEYS = (
    *("op", "direction", "provider", "device", "dtype", "case", "median_ms", "p20_ms", "p80_ms", "gflops"),
    *("gbytes_per_s", "share_of_limit", "speedup_vs_torch", "max_error", "torch_max_error", "versions"),
)
# A row of a result that broke the accuracy rule has this key too, with what is wrong, and no times.
WRONG = "wrong"
TORCH = "torch"
SLOWER = 0.95  # of torch's speed: what is below this is worth a look
_TIMES = ("median_ms", "p20_ms", "p80_ms")
_RATES = ("gflops", "gbytes_per_s", "share_of_limit", "speedup_vs_torch")
_COLUMNS = ("op", "case", "dtype", "provider", "ms (p20 to p80)", "rate", "of limit", "x torch", "max error")


def _milliseconds(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def cells(row: Row) -> tuple[str, ...]:
    """One line of the table."""
    rate = "" if row["gflops"] is None else f"{row['gflops']:.0f} GFLOP/s"
    if row["gbytes_per_s"] is not None:
        rate = f"{row['gbytes_per_s']:.1f} GB/s"
    spread = f"{_milliseconds(row['p20_ms'])} to {_milliseconds(row['p80_ms'])}"
    return (
        f"{row['op']} {row['direction']}",
        row["case"]["name"],
        row["dtype"],
        row["provider"],
        f"{_milliseconds(row['median_ms'])} ({spread})",
        rate,
        "" if row["share_of_limit"] is None else f"{row['share_of_limit']:.0%}",
        "" if row["speedup_vs_torch"] is None else f"{row['speedup_vs_torch']:.2f}",
        "" if row["max_error"] is None else f"{row['max_error']:.1e}",
    )


def table(rows: list[Row]) -> Table:
    """The table for the terminal, with a line between measurements."""
    found = Table(*_COLUMNS)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        style = "bold" if row["provider"] == "torchweld" else None
        found.add_row(*cells(row), style=style, end_section=following is None or work_key(following) != work_key(row))
    return found


def work_key(row: Row) -> tuple[Any, ...]:
    """What a measurement is of; its providers have it in common."""
    return row["op"], row["direction"], row["dtype"], json.dumps(row["case"], sort_keys=True)


def ours(row: Row) -> bool:
    """Whether it is torchweld's, by default or in a mode that was asked for."""
    return str(row["provider"]).startswith("torchweld")


def timed(rows: Sequence[Row]) -> list[Row]:
    """Those that are not wrong."""
    return [row for row in rows if not row.get(WRONG)]


def markdown(rows: list[Row]) -> str:
    """The table for a README: one line per measurement, torchweld beside every other provider."""
    rows = timed(rows)
    others = list(dict.fromkeys(r["provider"] for r in rows if r["provider"] != "torchweld"))
    header = ["work", "dtype", "torchweld ms", "rate", "of limit", *(f"x {name}" for name in others)]
    lines = [header, ["---"] * len(header)]
    by_work: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        by_work.setdefault(work_key(row), {})[row["provider"]] = row
    for providers in by_work.values():
        if (own := providers.get("torchweld")) is None:
            continue
        op, case, dtype, _, _, rate, share, _, _ = cells(own)
        ratios = [f"{providers[n]['median_ms'] / own['median_ms']:.2f}" if n in providers else "" for n in others]
        lines.append([f"{op}: {case}", dtype, _milliseconds(own["median_ms"]), rate, share, *ratios])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(rows: list[Row], path: Path) -> None:
    """A plot of the speed as a multiple of torch's: bars by direction and dtype for each case, on a log scale."""
    pyplot = plotter()
    own = [r for r in rows if r["provider"] == "torchweld" and r["speedup_vs_torch"] is not None]
    labels = list(dict.fromkeys(f"{r['op']}\n{r['case']['name']}" for r in own))
    series = list(dict.fromkeys((r["direction"], r["dtype"]) for r in own))
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.42 * len(labels)), layout="constrained")
    thickness = 0.8 / max(len(series), 1)
    for n, (direction, dtype) in enumerate(series):
        chosen = [r for r in own if (r["direction"], r["dtype"]) == (direction, dtype)]
        places = [labels.index(f"{r['op']}\n{r['case']['name']}") + (n + 0.5) * thickness - 0.4 for r in chosen]
        speedups = [r["speedup_vs_torch"] for r in chosen]
        bars = axes.barh(places, speedups, height=thickness, label=f"{direction}, {dtype}")
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=4)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels, fontsize=6)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.margins(x=0.1)
    axes.set_xlabel("times as fast as torch eager")
    axes.set_title(own[0]["device"] if own else "")
    if series:
        axes.legend(fontsize=7, loc="lower right")
    aside = path.with_name(f".{path.name}.part")
    figure.savefig(aside, format=path.suffix.removeprefix(".") or "png", dpi=150)
    pyplot.close(figure)
    os.replace(aside, path)


def plotter() -> Any:
    """matplotlib's pyplot, which draws to files only."""
    try:
        import matplotlib  # noqa: PLC0415  (an extra)
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install 'torchweld[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    return pyplot


def write(rows: list[Row], path: Path) -> None:
    """Writes JSON, one row a line."""
    write_text(path, "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def read(path: Path) -> list[Row]:
    """The rows of a file that `write` wrote, or of one with a row a line.

    Raises:
        UserError: the file cannot be read, or has something else in it.
    """
    try:
        text = path.read_text(encoding="utf-8").strip()
        rows = [json.loads(line) for line in text.splitlines()] if text.startswith("{") else json.loads(text)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a file of `torchweld bench --json`") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); expected a file of `torchweld bench --json`") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of rows, but got {type(rows).__name__}; make it with --json")
    for number, row in enumerate(rows, 1):
        if reason := _flaw(row):
            raise UserError(f"{path}: row {number}: {reason}; make the file with `torchweld bench --json`")
    return rows


def _flaw(row: Any) -> str | None:
    """What of a row is not as `bench --json` writes it."""
    if not isinstance(row, dict):
        return f"expected an object, but got {type(row).__name__}"
    if missing := [key for key in KEYS if key not in row]:
        return f"expected the key {missing[0]!r}, but it is missing"
    if not isinstance(row["case"], dict) or not isinstance(row["case"].get("name"), str):
        return f"case: expected an object with a name, but got {row['case']!r}"
    if not isinstance(row["versions"], dict):
        return f"versions: expected an object, but got {row['versions']!r}"
    for key in ("op", "direction", "provider", "device", "dtype"):
        if not isinstance(row[key], str):
            return f"{key}: expected text, but got {row[key]!r}"
    for key in KEYS:
        if key in _TIMES and not row.get(WRONG) and not _positive(row[key]):
            return f"{key}: expected a positive number, but got {row[key]!r}"
        if key in _RATES and row[key] is not None and not _positive(row[key]):
            return f"{key}: expected a positive number or null, but got {row[key]!r}"
        if key.endswith("max_error") and not (row[key] is None or isinstance(row[key], (int, float))):
            return f"{key}: expected a number or null, but got {row[key]!r}"
    return None


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
