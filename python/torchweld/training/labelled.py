"""Labelled texts from files: TSV, CSV or JSON lines, and their split by a hash of the text.

So a text is always in the same part, whatever else is in the files, and one that occurs twice is in one part alone.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torchweld.errors import UserError
from torchweld.training.corpus import read_files

MOST_LABELS = 2**15
T = TypeVar("T")


@dataclass(frozen=True)
class Rows:
    """Texts and what is said of each. `place`: file and line of the first one, for messages."""

    texts: list[str]
    labels: list[str]
    places: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def part(self, indices: Iterable[int]) -> Rows:
        """Those of `indices`."""
        chosen = list(indices)
        return Rows(*([column[i] for i in chosen] for column in (self.texts, self.labels, self.places)))

    @property
    def digest(self) -> str:
        """Of texts and labels."""
        pairs = zip(self.texts, self.labels, strict=True)
        return hashlib.sha256("\0".join(part for pair in pairs for part in pair).encode()).hexdigest()


def read_rows(paths: Sequence[str], text: str, label: str) -> Rows:
    """The rows of all files; a row without text is left out.

    Args:
        paths: `.csv`, `.jsonl`, or anything else with tabs between its columns.
        text, label: names of columns, which the first line has, or their numbers from 1 on, if it has data.

    Raises:
        UserError: a file cannot be read, or does not have the columns.
    """
    rows = Rows([], [], [])
    for place, (said, of) in read_columns(paths, (text, label)):
        if said.strip():
            rows.texts.append(" ".join(said.split()))
            rows.labels.append(of.strip())
            rows.places.append(place)
    return rows


def read_columns(paths: Sequence[str], wanted: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(place, columns) of each row of all files, in the order of `wanted`, as in `read_rows`."""
    for path, contents in zip(paths, read_files(paths), strict=True):
        for line, columns in _columns(path, contents, wanted):
            yield f"{path}, line {line}", columns


def _columns(path: str, contents: str, wanted: Sequence[str]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(line, columns) of each row."""
    kind, numbered = Path(path).suffix.lower(), all(name.isdigit() for name in wanted)
    if kind in (".jsonl", ".json"):
        for line, item in enumerate(contents.splitlines(), 1):
            if item.strip():
                yield line, _fields(path, line, item, wanted)
        return
    # Between tabs a quotation mark is a character like any other.
    style = {"delimiter": ","} if kind == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    reader = csv.reader(contents.splitlines(keepends=kind == ".csv"), **style)
    try:
        names = None if numbered else next(reader)
        if names is not None and (missing := [name for name in wanted if name not in names]):
            raise UserError(
                f"--data {path}: expected a column {missing[0]!r} in its first line, but got "
                f"{', '.join(map(repr, names[:8]))}; name the columns with --text and --label, or number them from 1 on"
            )
        places = [int(n) - 1 if names is None else names.index(n) for n in wanted]
        if min(places) < 0:
            raise UserError("--text, --label: expected numbers of columns from 1 on, but got 0")
        for row in reader:
            if row and not 0 <= min(places) <= max(places) < len(row):
                raise UserError(
                    f"--data {path}, line {reader.line_num}: expected at least {max(places) + 1} columns, but got "
                    f"{len(row)}"
                )
            if row:
                yield reader.line_num, tuple(row[place] for place in places)
    except csv.Error as error:
        raise UserError(f"--data {path}, line {reader.line_num}: expected columns, but got: {error}") from None


def _fields(path: str, line: int, item: str, wanted: Sequence[str]) -> tuple[str, ...]:
    try:
        values = json.loads(item)
    except ValueError as error:
        raise UserError(f"--data {path}, line {line}: expected a JSON object, but got: {error}") from None
    if not isinstance(values, dict) or not set(wanted) <= values.keys():
        names = ", ".join(map(repr, values)) if isinstance(values, dict) else type(values).__name__
        raise UserError(
            f"--data {path}, line {line}: expected an object with {' and '.join(map(repr, wanted))}, but got "
            f"{names}; name the keys with --text and --label"
        ) from None
    return tuple(str(values[name]) for name in wanted)


def numbers(rows: Rows) -> list[float]:
    """The labels as numbers.

    Raises:
        UserError: one is none, or not finite.
    """
    found = []
    for label, place in zip(rows.labels, rows.places, strict=True):
        try:
            value = float(label)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise UserError(f"--data {place}: expected a finite number in the label's column, but got {label!r}")
        found.append(value)
    return found


def label_names(rows: Rows) -> tuple[str, ...]:
    """The labels there are, in order.

    Raises:
        UserError: fewer than two, too many, or one that is empty.
    """
    names = tuple(sorted(set(rows.labels)))
    if "" in names:
        raise UserError(f"--data {rows.places[rows.labels.index('')]}: expected a label, but got none")
    if not 2 <= len(names) <= MOST_LABELS:
        some = ", ".join(map(repr, names[:3]))
        raise UserError(
            f"--data: expected 2 to {MOST_LABELS} different labels, but got {len(names)} ({some}); for numbers use "
            f"`fine-tune regress`"
        )
    return names


def part_of(text: str) -> int:
    """0, 1 or 2, training, validation or test, for eight, one and one of ten texts: always the same of a text."""
    return 2 - min(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 10, 2)


def parted(
    items: Sequence[T],
    text: Callable[[T], str],
    names: tuple[str, str] = ("texts", "text"),
    test: Sequence[T] | None = None,
) -> tuple[list[T], list[T], list[T]]:
    """Training, validation and test by what `text` says of an item.

    Args:
        names: what the items, and what their texts are called.
        test: the test, if it is apart; the last tenth is for training then.

    Raises:
        UserError: one of the parts is empty.
    """
    parts: tuple[list[T], list[T], list[T]] = ([], [], list(test or ()))
    for item in items:
        part = part_of(text(item))
        parts[0 if part == 2 and test is not None else part].append(item)
    if not all(parts):
        sizes = " / ".join(str(len(part)) for part in parts)
        raise UserError(
            f"--data: expected {names[0]} for training, validation and test, but got {sizes} of {len(items)} (a hash "
            f"of the {names[1]} decides); give more of them"
        )
    return parts


def split(rows: Rows) -> tuple[Rows, Rows, Rows]:
    """Training, validation and test: eight, one and one of ten texts.

    Raises:
        UserError: one of them is empty.
    """
    training, validation, test = (rows.part(part) for part in parted(range(len(rows)), rows.texts.__getitem__))
    return training, validation, test
