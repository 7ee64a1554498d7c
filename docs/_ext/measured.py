"""The directives `measured`, `speeds`, `sweep` and `heatmap`: what bench/results holds, as plots and as tables."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from pictures import INK, adaptive, picture, wide
from torchweld.bench import report, sweep

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
WIDTH = 480  # of a plot on a page, in pixels; at 96 of them an inch
COLOURS = {"float32": "#3b7dd8", "bfloat16": "#d9822b", "float16": "#3a9d5d"}
ALPHA = {"backward": 0.6}  # of a colour, by direction
Row = dict[str, Any]


@cache
def results() -> dict[str, list[Row]]:
    """The rows of each file, those of most rows first. Sweeps, whose rows are not checked, are left out."""
    found = {p.name: report.read(p) for p in RESULTS.glob("*.json") if not p.stem.endswith("-sweep")}
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def machine(rows: Sequence[Row]) -> str:
    """What the rows were measured on, in words."""
    row, versions = rows[0], rows[0]["versions"]
    threads = "one thread" if versions["threads"] == 1 else f"{versions['threads']} threads"
    return f"{row['device']}, instruction set {versions['cpu_isa']}, {threads}, torch {versions['torch']}"


def bars(rows: Sequence[Row]) -> str:
    """torch's time over ours as horizontal bars, a bar for each case, direction and dtype."""
    pyplot = report.plotter()
    ours = [r for r in rows if r["provider"] == "torchweld" and r["speedup_vs_torch"] is not None]
    works = list(dict.fromkeys((r["op"], r["direction"], r["case"]["name"]) for r in ours))
    dtypes = [d for d in COLOURS if any(r["dtype"] == d for r in ours)]
    several = len({op for op, _, _ in works}) > 1
    thickness = 0.8 / len(dtypes)
    settings = {
        **{"svg.fonttype": "none", "svg.hashsalt": "torchweld", "font.size": 8, "axes.edgecolor": INK},
        **{"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK},
    }
    with pyplot.rc_context(settings):
        figure, axes = pyplot.subplots(figsize=(WIDTH / 96, 0.9 + 0.3 * len(works)), layout="constrained")
        for n, dtype in enumerate(dtypes):
            chosen = [r for r in ours if r["dtype"] == dtype]
            at = [
                works.index((r["op"], r["direction"], r["case"]["name"])) + (n + 0.5) * thickness - 0.4 for r in chosen
            ]
            drawn = axes.barh(at, [r["speedup_vs_torch"] for r in chosen], thickness, color=COLOURS[dtype], label=dtype)
            for bar, row in zip(drawn, chosen, strict=True):
                bar.set_alpha(ALPHA.get(row["direction"], 1.0))
            axes.bar_label(drawn, fmt="%.2f", padding=2, fontsize=6.5)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.axvline(1.0, color=INK, linewidth=0.8)
        names = [f"{op + ' ' if several else ''}{direction}: {case}" for op, direction, case in works]
        axes.set_yticks(range(len(works)), [name.replace(", ", ",\n", 1) for name in names], fontsize=6.5)
        axes.set_ylim(len(works) - 0.4, -0.6)
        axes.margins(x=0.12)
        axes.set_xlabel("torch's time over ours")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        figure.legend(frameon=False, fontsize=7, loc="outside upper right", ncols=3)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    return adaptive(text.getvalue())


def tables(directive: SphinxDirective, text: str) -> list[nodes.Node]:
    """The nodes of a Markdown text, its tables marked as figures: small, and on one line a row."""
    found = directive.parse_text_to_nodes(text)
    for node in found:
        if isinstance(node, nodes.table):
            node["classes"].append("figures")
    return found


class Speeds(SphinxDirective):
    """A plot of chosen rows. Each line of its content is an op, a direction and the name of a case."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        every: dict[str, dict[str, list[Row]]] = {}
        for name, rows in reversed(results().items()):  # of a case that several files have, the largest file's
            self.env.note_dependency(str(RESULTS / name))
            for row in rows:
                work = f"{row['op']} {row['direction']} {row['case']['name']}"
                every.setdefault(work, {})[name] = [*every.get(work, {}).get(name, []), row]
        if unknown := set(self.content) - every.keys():
            raise self.error(f"bench/results has no rows of {sorted(unknown)}")
        chosen = [row for work in self.content for row in list(every[work].values())[-1]]
        alt = "torch's time over ours; the pages of the operators have these numbers as tables"
        shown = picture(self.env, f"speeds-{self.env.docname.replace('/', '-')}", bars(chosen), alt, WIDTH)
        return [shown, *self.parse_text_to_nodes(f"Measured on: {machine(chosen)}.")]


class Measured(SphinxDirective):
    """All checked rows of the ops that are its arguments."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        ops = self.arguments[0].split()
        shown: list[nodes.Node] = []
        for name, rows in results().items():
            self.env.note_dependency(str(RESULTS / name))
            chosen = [r for r in rows if r["op"] in ops]
            if not chosen:
                continue
            if not shown:
                alt = f"torch's time over ours for {', '.join(ops)}, the numbers of the table that follows"
                shown.append(picture(self.env, "speed-" + "-".join(ops), bars(chosen), alt, WIDTH))
            shown += tables(self, f"**{machine(chosen)}** (`bench/results/{name}`)\n\n{report.markdown(chosen)}")
        if not shown:
            raise self.error(f"bench/results has no rows of {self.arguments[0]}")
        return shown


class Sweep(SphinxDirective):
    """Every cell of the sweep of one op: torch's time over ours by size. Its argument is the op's name there."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        op = self.arguments[0]
        lines: list[str] = []
        for path in sorted(RESULTS.glob("*-sweep.json")):
            self.env.note_dependency(str(path))
            rows = [r for r in report.read(path) if r["op"] == op and r["provider"] == "torchweld"]
            if rows:
                lines += [f"**{machine(rows)}** (`bench/results/{path.name}`)", "", *self._table(rows), ""]
        if not lines:
            raise self.error(f"no sweep of bench/results has rows of {op!r}")
        return tables(self, "\n".join(lines))

    def _table(self, rows: Sequence[Row]) -> list[str]:
        sizes = list(dict.fromkeys(r["case"]["name"] for r in rows))
        kinds = list(dict.fromkeys((r["direction"], r["dtype"]) for r in rows))
        lines = ["| size | " + " | ".join(map(", ".join, kinds)) + " |", "| --- " * (len(kinds) + 1) + "|"]
        ratios = {(r["case"]["name"], r["direction"], r["dtype"]): f"{r['speedup_vs_torch']:.2f}" for r in rows}
        for size in sizes:
            cells = [ratios.get((size, *kind), "") for kind in kinds]
            lines.append(f"| {size} | " + " | ".join(cells) + " |")
        return lines


class HeatMap(SphinxDirective):
    """All cells of a sweep, as `torchweld bench sweep --plot` draws them. Its argument is a file of bench/results."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        path = RESULTS / self.arguments[0]
        self.env.note_dependency(str(path))
        image = Path(self.env.app.outdir, "_images", path.with_suffix(".png").name)
        image.parent.mkdir(parents=True, exist_ok=True)
        sweep.heat_map(report.read(path), image)
        source = "../" * self.env.docname.count("/") + f"_images/{image.name}"
        alt = "Each cell is torch's time over ours; the pages of the operators have the numbers as tables"
        return [wide(f'<img src="{source}" alt="{alt}">', "Heat map")]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("measured", Measured)
    app.add_directive("speeds", Speeds)
    app.add_directive("sweep", Sweep)
    app.add_directive("heatmap", HeatMap)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
