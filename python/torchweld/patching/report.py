"""The report of `patch`: what was swapped, what was left and why, as a table; and the undo."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple
from weakref import ref

import torch

if TYPE_CHECKING:
    from rich.table import Table

    from torchweld.patching.changes import Change


@dataclass(frozen=True)
class Entry:
    """One module. `name`: its path in the model; `now`: what serves it; `why`: why it was left (`now` is then None).

    `timing`: what `patch(..., tune=...)` has measured of a swap that it kept.
    """

    name: str
    was: str
    now: str | None = None
    why: str = ""
    timing: str = ""


class Times(NamedTuple):
    """Seconds of a call with a swap, and of the same call without."""

    now: float
    before: float

    def __str__(self) -> str:
        unit, name = (1e-3, "ms") if max(self) >= 1e-3 else (1e-6, "us")
        return f"{self.now / unit:.3g} {name}, {self.before / unit:.3g} {name} before"


@dataclass
class _Swap:
    """A change, and how to make it again once it was taken back; `make` keeps the module alive."""

    entry: Entry
    change: Change
    make: Callable[[], Change] | None


@dataclass
class Report:
    """`print(report)` prints the table; `report.undo()` takes back the swaps. A report keeps no module alive."""

    _model: ref[torch.nn.Module]
    swapped: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)
    title: str = "torchweld.patch"
    advice: str = ""
    _swaps: list[_Swap] = field(default_factory=list, repr=False)

    @property
    def model(self) -> torch.nn.Module | None:
        """The model; None if it was deleted."""
        return self._model()

    def swap(self, entry: Entry, make: Callable[[], Change]) -> None:
        """Makes a change and records it."""
        swap = _Swap(entry, make(), make)
        self.swapped.append(entry)
        self._swaps.append(swap)

    def leave(self, name: str, was: str, why: str) -> None:
        """Records a module that stays as it is."""
        self.left.append(Entry(name, was, None, why))

    def undo(self) -> Report:
        """Takes back every change that is still as `patch` made it. Reports what was taken back, what was not, and why.

        Modules that are no longer part of the model are restored too. The next `undo` tries again what this one could
        not take back.
        """
        report = Report(self._model, title="torchweld.patch, undone")
        swaps, self._swaps = self._swaps, []
        for swap in reversed(swaps):
            entry = swap.entry
            try:
                why = swap.change.undo()
            except Exception as e:  # an error of one module must not keep the others swapped
                why = f"{type(e).__name__}: {e}"
            if why is not None:
                report.leave(entry.name, entry.now or "", why)
                self._swaps.insert(0, swap)
            else:
                report.swapped.append(Entry(entry.name, entry.now or "", entry.was))
        return report

    # ---- What `tune` measures. Swaps of one report lie in each other only as modules do, so each is taken back alone.

    def suspend(self, entry: Entry) -> None:
        """Takes a swap back for a while."""
        if (why := self._of(entry).change.undo()) is not None:
            raise RuntimeError(f"[patch] {entry.name}: expected a swap that can be taken back, but {why}")

    def resume(self, entry: Entry) -> None:
        """Makes a suspended swap again."""
        swap = self._of(entry)
        assert swap.make is not None
        swap.change = swap.make()

    def keep(self, entry: Entry, timing: str) -> None:
        """Records what was measured of a swap that stays."""
        swap = self._of(entry)
        swap.entry = self.swapped[self.swapped.index(entry)] = replace(entry, timing=timing)

    def take_back(self, entry: Entry, why: str) -> None:
        """Takes a swap back for good."""
        self.suspend(entry)
        self._swaps.remove(self._of(entry))
        self.swapped.remove(entry)
        self.leave(entry.name, entry.was, why)

    def close(self) -> None:
        """Forgets how swaps are made: from now on they can only be taken back."""
        for swap in self._swaps:
            swap.make = None

    def _of(self, entry: Entry) -> _Swap:
        return next(swap for swap in self._swaps if swap.entry is entry)

    def __rich__(self) -> Table:
        from rich.table import Table  # noqa: PLC0415  (only a report that is shown needs it)

        table = Table("modules", "", "was", "now", title=self.title, title_justify="left", show_edge=False)
        table.caption_justify = "left"
        for entries, style in ((self.swapped, None), (self.left, "yellow")):
            groups: dict[tuple[str, str, str], int] = {}
            for e in entries:
                # Layers whose names differ only by a number share a line.
                now = f"left: {e.why}" if e.now is None else f"{e.now} ({e.timing})" if e.timing else e.now
                key = (re.sub(r"\b\d+\b", "*", e.name) or "(the model)", e.was, now)
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
