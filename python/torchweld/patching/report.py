"""The report of `patch`: what was swapped, what was left and why, as a table; and the undo."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import ref

import torch

if TYPE_CHECKING:
    from rich.table import Table

    from torchweld.patching.changes import Change


@dataclass(frozen=True)
class Entry:
    """One module. `name`: its path in the model; `now`: what serves it; `why`: why it was left (`now` is then None)."""

    name: str
    was: str
    now: str | None = None
    why: str = ""


@dataclass
class Report:
    """`print(report)` prints the table; `report.undo()` takes back the swaps. A report keeps no module alive."""

    _model: ref[torch.nn.Module]
    swapped: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)
    title: str = "torchweld.patch"
    advice: str = ""
    _changes: list[tuple[Entry, Change]] = field(default_factory=list, repr=False)

    @property
    def model(self) -> torch.nn.Module | None:
        """The model; None if it was deleted."""
        return self._model()

    def swap(self, entry: Entry, change: Change) -> None:
        """Records a change."""
        self.swapped.append(entry)
        self._changes.append((entry, change))

    def leave(self, name: str, was: str, why: str) -> None:
        """Records a module that stays as it is."""
        self.left.append(Entry(name, was, None, why))

    def undo(self) -> Report:
        """Takes back every change that is still as `patch` made it. Reports what was taken back, what was not, and why.

        Modules that are no longer part of the model are restored too. The next `undo` tries again what this one could
        not take back.
        """
        report = Report(self._model, title="torchweld.patch, undone")
        changes, self._changes = self._changes, []
        for entry, change in reversed(changes):
            try:
                why = change.undo()
            except Exception as e:  # an error of one module must not keep the others swapped
                why = f"{type(e).__name__}: {e}"
            if why is not None:
                report.leave(entry.name, entry.now or "", why)
                self._changes.insert(0, (entry, change))
            else:
                report.swapped.append(Entry(entry.name, entry.now or "", entry.was))
        return report

    def __rich__(self) -> Table:
        from rich.table import Table  # noqa: PLC0415  (only a report that is shown needs it)

        table = Table("modules", "", "was", "now", title=self.title, title_justify="left", show_edge=False)
        table.caption_justify = "left"
        for entries, style in ((self.swapped, None), (self.left, "yellow")):
            groups: dict[tuple[str, str, str], int] = {}
            for e in entries:
                # Layers whose names differ only by a number share a line.
                key = (re.sub(r"\b\d+\b", "*", e.name) or "(the model)", e.was, e.now or f"left: {e.why}")
                groups[key] = groups.get(key, 0) + 1
            for (name, was, now), count in groups.items():
                table.add_row(name, f"x {count}" if count > 1 else "", was, now, style=style)
        if not self.swapped and not self.left:
            table.add_row("nothing to swap", "", "", "")
        table.caption = self.advice
        return table

    def __str__(self) -> str:
        from rich.console import Console  # noqa: PLC0415

        console = Console(width=160, highlight=False, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())
