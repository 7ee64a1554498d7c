"""`torchweld bench compare OLD NEW`: what became slower, beyond the noise of both files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from torchweld.bench.report import TORCH, WRONG, Row, ours, work_key
from torchweld.errors import UserError

_VERSIONS = ("torchweld", "torch", "python", "threads", "cpu_isa", "cuda")


@dataclass(frozen=True)
class Change:
    """One measurement in both files.

    Attributes:
        time: the new median over the old one.
        relative: the same of the multiple of torch's time, timed in the same rounds; None where torch is not in both.
        verdict: "slower", "faster", "wrong", or "" for what is within the noise.
    """

    row: Row
    time: float | None
    relative: float | None
    verdict: str


def compare(old: Sequence[Row], new: Sequence[Row]) -> list[Change]:
    """What became of the measurements of torchweld that both files have; of two of one kind in a file the later counts.

    A measurement is slower if its new 20th percentile lies above its old 80th, and so if both are divided by torch's
    median in the same file: a machine that is busier, or clocked lower, slows torch down as well.

    Raises:
        UserError: the files have no measurement in common.
    """
    before, after = _by_key(old), _by_key(new)
    common = [key for key, row in after.items() if key in before and ours(row) and not before[key].get(WRONG)]
    if not common:
        raise UserError(
            "bench compare: expected two files that have measurements of torchweld in common, but got none; "
            "make both with the same OPs, --dtype and --quick"
        )
    return [_change(key, before, after) for key in common]


Key = tuple[object, ...]


def _by_key(rows: Sequence[Row]) -> dict[Key, Row]:
    return {(*work_key(row), row["provider"]): row for row in rows}


def _change(key: Key, before: dict[Key, Row], after: dict[Key, Row]) -> Change:
    old, new = before[key], after[key]
    if new.get(WRONG):
        return Change(new, None, None, "wrong")
    verdicts = {_verdict(old, new, 1.0, 1.0)}
    relative = None
    torch_old, torch_new = before.get((*key[:-1], TORCH)), after.get((*key[:-1], TORCH))
    if torch_old is not None and torch_new is not None:
        units = torch_old["median_ms"], torch_new["median_ms"]
        relative = (new["median_ms"] / units[1]) / (old["median_ms"] / units[0])
        verdicts.add(_verdict(old, new, *units))
    verdict = verdicts.pop() if len(verdicts) == 1 else ""
    return Change(new, new["median_ms"] / old["median_ms"], relative, verdict)


def _verdict(old: Row, new: Row, old_unit: float, new_unit: float) -> str:
    if new["p20_ms"] / new_unit > old["p80_ms"] / old_unit:
        return "slower"
    return "faster" if new["p80_ms"] / new_unit < old["p20_ms"] / old_unit else ""


def table(changes: Sequence[Change]) -> Table:
    """Those that are beyond the noise, the worst ones first."""
    found = Table(
        "op", "case", "dtype", "provider", "time", "beside torch's", "", title="new over old, beyond the noise"
    )
    beyond = [change for change in changes if change.verdict]
    for change in sorted(beyond, key=lambda each: -(each.time or float("inf"))):
        row, style = change.row, "green" if change.verdict == "faster" else "red"
        numbers = ("" if x is None else f"{x:.2f}" for x in (change.time, change.relative))
        what = (f"{row['op']} {row['direction']}", row["case"]["name"], row["dtype"], row["provider"])
        found.add_row(*what, *numbers, change.verdict, style=style)
    return found


def alone(old: Sequence[Row], new: Sequence[Row]) -> tuple[int, int]:
    """How many measurements of torchweld only the old file has, and how many only the new one."""
    before, after = ({key for key, row in _by_key(rows).items() if ours(row)} for rows in (old, new))
    return len(before - after), len(after - before)


def differences(old: Sequence[Row], new: Sequence[Row]) -> list[str]:
    """What of machine and versions is not the same, in words."""
    found = []
    for name in ("device", *_VERSIONS):
        values = [_values(rows, name) for rows in (old, new)]
        if values[0] != values[1]:
            found.append(f"{name}: {values[0] or 'none'} -> {values[1] or 'none'}")
    return found


def _values(rows: Sequence[Row], name: str) -> str:
    each = (row["device"] if name == "device" else row["versions"].get(name) for row in rows)
    return ", ".join(dict.fromkeys(str(value) for value in each if value is not None))


def failed(changes: Sequence[Change]) -> bool:
    """Whether anything became slower or wrong."""
    return any(change.verdict in ("slower", "wrong") for change in changes)
