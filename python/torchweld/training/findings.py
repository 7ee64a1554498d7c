"""What a run has to show in the end: printed at once, and kept for its page."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from torchweld.files import write_text
from torchweld.pages import page
from torchweld.pages.tables import Cell, Column, Row, table
from torchweld.training import scores


class Findings:
    """The console of a program's `show`.

    Attributes:
        out: the directory of the run.
        parts: what was shown, as parts of a page.
        settings: what the run is made of, by name.
    """

    def __init__(self, console: Console, out: Path) -> None:
        self.console, self.out = console, out
        self.parts: list[str] = []
        self.settings: dict[str, str] = {}

    def print(self, what: str | Table) -> None:
        """A line, or a table."""
        self.console.print(what)
        self.parts.append(page.text(what) if isinstance(what, str) else _html(what))

    def introduce(self, name: str, text: str) -> None:
        """A line on what the run is made of."""
        self.console.print(f"{name}: {text}")
        self.settings[name] = text

    def scores(self, title: str, ours: scores.Scored, others: scores.Scored) -> None:
        """How good predictions are, beside the baselines; the numbers go to OUT/scores.json as well."""
        shown, rows = scores.table(ours, others), {**ours, **others}
        shown.title = title
        self.console.print(shown)
        digits, best = scores.columns(rows)
        columns = [Column(""), *(Column(name, number=True) for name in digits)]
        lines = []
        for who, each in rows.items():
            cells = [
                Cell(f"{each[name]:.{digits[name]}f}", each[name], best=each[name] == best[name])
                if name in each
                else Cell("-")
                for name in digits
            ]
            lines.append(Row([who, *cells], "ours" if who in ours else ""))
        self.parts += [table(title, columns, lines), page.text("The best of each column is marked.", "quiet")]
        write_text(self.out / "scores.json", json.dumps(rows, indent=1) + "\n")

    def sample(self, title: str, text: str) -> None:
        """Text that a model has made."""
        self.console.rule(title)
        self.console.print(text)
        self.console.rule()
        self.parts += [page.heading(title), page.verbatim(text)]

    def picture(self, words: str, path: Path, pixels: bool = False) -> None:
        """A PNG that lies in the directory of the run. `pixels`: it is drawn with hard edges."""
        self.console.print(f"{words}: {path}")
        self.parts.append(page.picture(path, words, pixels))


def _html(shown: Table) -> str:
    """The same table in a page."""
    columns = [Column(str(column.header), number=column.justify == "right") for column in shown.columns]
    rows = [Row([str(cell) for cell in cells]) for cells in zip(*(c.cells for c in shown.columns), strict=True)]
    return table(str(shown.title or "scores"), columns, rows)
