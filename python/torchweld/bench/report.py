"""Rows of `bench` as a table on the terminal, as Markdown, and as a plot."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rich.table import Table

from torchweld.errors import UserError

Row = dict[str, Any]
KEYS = (
    *("op", "direction", "provider", "device", "dtype", "case", "median_ms", "p20_ms", "p80_ms", "gflops"),
    *("gbytes_per_s", "share_of_limit", "speedup_vs_torch", "max_error", "torch_max_error", "versions"),
)
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
        found.add_row(*cells(row), style=style, end_section=following is None or _work(following) != _work(row))
    return found


def _work(row: Row) -> tuple[Any, ...]:
    return row["op"], row["direction"], row["dtype"], json.dumps(row["case"])


def markdown(rows: list[Row]) -> str:
    """The table for a README: one line per measurement, torchweld beside every other provider."""
    others = list(dict.fromkeys(r["provider"] for r in rows if r["provider"] != "torchweld"))
    header = ["work", "dtype", "torchweld ms", "rate", "of limit", *(f"x {name}" for name in others)]
    lines = [header, ["---"] * len(header)]
    by_work: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        by_work.setdefault(_work(row), {})[row["provider"]] = row
    for providers in by_work.values():
        if (ours := providers.get("torchweld")) is None:
            continue
        op, case, dtype, _, _, rate, share, _, _ = cells(ours)
        ratios = [f"{providers[n]['median_ms'] / ours['median_ms']:.2f}" if n in providers else "" for n in others]
        lines.append([f"{op}: {case}", dtype, _milliseconds(ours["median_ms"]), rate, share, *ratios])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(rows: list[Row], path: Path) -> None:
    """A plot of the speed as a multiple of torch's: bars by direction and dtype for each case, on a log scale."""
    pyplot = plotter()
    ours = [r for r in rows if r["provider"] == "torchweld" and r["speedup_vs_torch"] is not None]
    labels = list(dict.fromkeys(f"{r['op']}\n{r['case']['name']}" for r in ours))
    series = list(dict.fromkeys((r["direction"], r["dtype"]) for r in ours))
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.42 * len(labels)), layout="constrained")
    thickness = 0.8 / max(len(series), 1)
    for n, (direction, dtype) in enumerate(series):
        chosen = [r for r in ours if (r["direction"], r["dtype"]) == (direction, dtype)]
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
    axes.set_title(ours[0]["device"] if ours else "")
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
    """Writes JSON, one row a line, to another name, and renames it: the file is whole or not there."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    os.replace(aside, path)


def read(path: Path) -> list[Row]:
    """The rows of a file that `write` wrote."""
    try:
        rows = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a file of `torchweld bench --json`") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); expected a file of `torchweld bench --json`") from error
    if not isinstance(rows, list) or any(not isinstance(r, dict) or set(KEYS) - r.keys() for r in rows):
        raise UserError(f"{path}: expected a list of rows with the keys {', '.join(KEYS)}")
    return rows
