"""Rows of `bench` as a page for a browser: summary, rooflines, heat maps, and every row in a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import geometric_mean, median

import torchweld
from torchweld.bench.report import SLOWER, TORCH, WRONG, Row, cells, ours, timed, work_key
from torchweld.pages import page
from torchweld.pages.charts import Axis, Series, chart
from torchweld.pages.page import Page
from torchweld.pages.tables import Cell, Column, heat_map, table
from torchweld.pages.tables import Row as Line

_METHOD = {
    "Check, then time.": "Each result of torchweld is held to the float64 definition on the same inputs first: "
    "max|ours - float64| <= 2 x max|torch in the same dtype - float64| + one ulp, for each output and gradient. What "
    "breaks this rule is not timed; the section Wrong results names it in red. The column of errors has the largest "
    "distance from float64 over all tensors of a call. Rows of `torchweld bench sweep` have none: it only times.",
    "Side by side.": "All providers are called in turn, one launch each a round, and each round starts with the next "
    "provider. What else the machine does hits all alike, so ratios are steadier than times.",
    "Medians.": "A time is the median of the rounds after a warm-up, with the 20th and 80th percentiles. Outputs are "
    "allocated within the time, as in a user's call; malloc keeps its memory, for all providers.",
    "The limit.": "Each round ends with a plain copy of as many bytes as the op must move, or with a matrix product in "
    "the same dtype. The share of the limit is the op's rate over that one's. More than 100% is possible: half of a "
    "copy's bytes are written, an op may read more than it writes, and calls are not disturbed alike.",
    "On a GPU": "CUDA events time a launch, after a write that empties the second-level cache.",
}


def write(rows: Sequence[Row], path: Path, sources: Sequence[str], notes: Sequence[str] = ()) -> None:
    """Writes the page. `sources`: where the rows come from; `notes`: what was not timed, and why.

    Raises:
        UserError: the file cannot be written.
    """
    build(rows, sources, notes).write(path)


def build(rows: Sequence[Row], sources: Sequence[str], notes: Sequence[str] = ()) -> Page:
    """The page of these rows."""
    machines = _by_machine(rows)
    devices = " and ".join(dict.fromkeys(row["device"] for row in rows))
    found = Page(
        "torchweld beside torch",
        f"{_count(sum(map(ours, rows)), 'measurement')}{' on ' if devices else ''}{devices}.",
        f"Made by torchweld {torchweld.__version__} from {' and '.join(sources)}.",
    )
    found.add("Summary", *_summary(rows))
    wrong = [row for row in rows if row.get(WRONG)]
    if wrong:
        found.add("Wrong results", page.text(f"{_count(len(wrong), 'result')} broke the accuracy rule.", "alert"))
        found.add("Wrong results", _wrong(wrong))
    if notes:
        found.add("Not timed", page.points(dict.fromkeys(notes, "")))
    for machine, part in machines.items():
        beside = f", {machine}" if len(machines) > 1 else ""
        found.add("Rooflines", page.beside(*_rooflines(timed(part), beside)))
    for machine, part in machines.items():
        found.add("Ratios", *_ratios(timed(part), f", {machine}" if len(machines) > 1 else ""))
    found.add("All rows", _all(rows, several=len(machines) > 1))
    found.add("Machine and versions", *(_machine(name, part) for name, part in machines.items()))
    found.add("How it was measured", page.points(_METHOD))
    return found


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _label(row: Row) -> str:
    """The machine, in words."""
    versions = row["versions"]
    isa = f", {versions['cpu_isa']}" if "cpu_isa" in versions and "cuda" not in versions else ""
    return f"{row['device']}{isa}, {_count(versions.get('threads', 1), 'thread')}, torch {versions.get('torch')}"


def _by_machine(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(_label(row), []).append(row)
    return found


def _summary(rows: Sequence[Row]) -> Iterator[str]:
    compared = [r for r in timed(rows) if ours(r) and r["speedup_vs_torch"] is not None]
    wrong = sum(bool(row.get(WRONG)) for row in rows)
    values = {"measurements": str(sum(map(ours, timed(rows)))), "wrong": str(wrong)}
    if compared:
        ratios = [row["speedup_vs_torch"] for row in compared]
        values["speed, times torch's"] = f"{geometric_mean(ratios):.2f}"
        values["slowest"] = f"{min(ratios):.2f}"
        values["fastest"] = f"{max(ratios):.2f}"
        values[f"below {SLOWER}"] = f"{sum(r < SLOWER for r in ratios)} of {len(ratios)}"
    yield page.tiles(values)
    yield page.text("Speeds are multiples of eager torch's; the mean is the geometric one.", "quiet")
    kinds: dict[tuple[str, ...], list[Row]] = {}
    several = len(_by_machine(rows)) > 1
    for row in compared:
        kind = (row["op"], row["direction"], row["dtype"], row["provider"], *[_label(row)] * several)
        kinds.setdefault(kind, []).append(row)
    columns = [Column("op"), Column("direction"), Column("dtype"), Column("provider")]
    columns += [Column("machine", wraps=False)] * several
    columns += [Column(name, number=True) for name in ("cases", "mean", "slowest", "fastest", "of limit, median")]
    lines = []
    for kind, part in kinds.items():
        ratios = [row["speedup_vs_torch"] for row in part]
        shares = [row["share_of_limit"] for row in part if row["share_of_limit"] is not None]
        share = Cell(f"{median(shares):.0%}", median(shares), share=median(shares)) if shares else ""
        means = [Cell(f"{x:.2f}", x) for x in (geometric_mean(ratios), min(ratios), max(ratios))]
        lines.append(Line([*kind, Cell(str(len(part)), len(part)), *means, share]))
    if lines:
        yield table("Speed by op, times torch's", columns, lines)


def _wrong(rows: Sequence[Row]) -> str:
    columns = [Column("op"), Column("case"), Column("dtype"), Column("what is wrong")]
    lines = [Line([f"{r['op']} {r['direction']}", r["case"]["name"], r["dtype"], r[WRONG]], "wrong") for r in rows]
    return table("Results that broke the accuracy rule", columns, lines)


def _rooflines(rows: Sequence[Row], beside: str) -> Iterator[str]:
    """Rate over the size of a call: one chart of what moves memory, and one for each dtype of what multiplies."""
    limited = [row for row in rows if row["share_of_limit"]]
    bytes_of = [row for row in limited if row["gbytes_per_s"] is not None]
    yield _roofline(
        f"Limited by memory{beside}", bytes_of, "gbytes_per_s", ("bytes that a call must move, MB", "GB/s"), "a copy"
    )
    flops_of = [row for row in limited if row["gflops"] is not None]
    for dtype in dict.fromkeys(row["dtype"] for row in flops_of):
        part = [row for row in flops_of if row["dtype"] == dtype]
        names = ("operations of a call, MFLOP", "GFLOP/s")
        yield _roofline(f"Limited by arithmetic, {dtype}{beside}", part, "gflops", names, "a matrix product")


def _roofline(caption: str, rows: Sequence[Row], rate: str, names: tuple[str, str], limit: str) -> str:
    if not rows:
        return ""
    series = []
    roof: dict[float, list[float]] = {}
    for row in rows:
        if ours(row):
            roof.setdefault(_amount(row, rate), []).append(row[rate] / row["share_of_limit"])
    line = [(amount, median(found)) for amount, found in sorted(roof.items())]
    providers = dict.fromkeys(row["provider"] for row in rows)
    for i, provider in reversed([*enumerate(providers)]):  # the first, which is ours, on top
        part = [row for row in rows if row["provider"] == provider]
        where = [(_amount(row, rate), row[rate]) for row in part]
        labels = ["{3}, {0}, {1}, {2}: {6}".format(*cells(row)) for row in part]
        series.append(Series(provider, where, joined=False, labels=labels, colour=i, dash=min(i, 2)))
    name = f"{limit}, in the same rounds"
    if len(line) > 1:
        series.insert(0, Series(name, line, dash=1))
    levels = {name: line[0][1]} if len(line) == 1 else None
    lead = f"Each mark is a row of the table below; the dashed line is what {limit} reached beside it."
    return chart(caption, Axis(names[0], log=True), Axis(names[1], log=True), series, levels, f"{caption}. {lead}")


def _amount(row: Row, rate: str) -> float:
    """MB or MFLOP of a call: its rate, in 10^9 a second, times milliseconds; rounded, so that equal ones are equal."""
    return float(f"{row[rate] * row['median_ms']:.6g}")


def _ratios(rows: Sequence[Row], beside: str) -> Iterator[str]:
    """Heat maps by op, beside each provider."""
    by_work: dict[object, dict[str, Row]] = {}
    for row in rows:
        by_work.setdefault(work_key(row), {})[row["provider"]] = row
    rivals = list(dict.fromkeys(row["provider"] for row in rows if not ours(row)))
    for rival in sorted(rivals, key=lambda name: name != TORCH):
        maps: dict[str, dict[str, dict[str, float]]] = {}
        for providers in by_work.values():
            if "torchweld" in providers and rival in providers:
                row = providers["torchweld"]
                grid = maps.setdefault(row["op"], {}).setdefault(row["case"]["name"], {})
                grid[f"{row['direction']}, {row['dtype']}"] = providers[rival]["median_ms"] / row["median_ms"]
        if maps:
            yield page.heading(f"Times as fast as {rival}{beside}")
            yield page.beside(*(heat_map(f"{op}, {rival}'s time over torchweld's", grid) for op, grid in maps.items()))


def _all(rows: Sequence[Row], several: bool) -> str:
    columns = [Column("op", choices=True), Column("direction", choices=True), Column("case")]
    columns += [Column("dtype", choices=True), Column("provider", choices=True)]
    columns += [Column(name, number=True) for name in ("ms", "20% to 80%", "rate", "of limit", "x torch", "max error")]
    columns += [Column("machine", choices=True, wraps=False)] * several
    lines = []
    for row in rows:
        what = [row["op"], row["direction"], row["case"]["name"], row["dtype"], row["provider"]]
        where = [_label(row)] * several
        if row.get(WRONG):
            lines.append(Line([*what, "wrong", "", "", "", "", Cell(""), *where], "wrong"))
            continue
        _, _, _, _, time, rate, share, ratio, error = cells(row)
        middle, spread = time.removesuffix(")").split(" (")
        numbers = [
            Cell(middle, row["median_ms"]),
            Cell(spread, row["p20_ms"]),
            Cell(rate, row["gbytes_per_s"] if row["gbytes_per_s"] is not None else row["gflops"]),
            Cell(share, row["share_of_limit"], share=row["share_of_limit"]),
            Cell(ratio, row["speedup_vs_torch"]),
            Cell(error, row["max_error"]),
        ]
        lines.append(Line([*what, *numbers, *where], "ours" if ours(row) else ""))
    return table("All measurements", columns, lines, filters=True)


def _machine(name: str, rows: Sequence[Row]) -> str:
    values = {"device": rows[0]["device"]}
    for row in rows:
        for key, value in row["versions"].items():
            known = values.setdefault(key, str(value))
            if str(value) not in known.split(" and "):
                values[key] = f"{known} and {value}"
    return page.heading(name) + page.pairs(values)
