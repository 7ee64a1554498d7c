"""Who had what, and when: ratings from files, as the sequence of items of each user.

Files have a line for each rating: those of MovieLens (u.data, ratings.csv), of RecBole (.inter), or any other with tabs
or commas between columns that are named. How something was rated does not count, only what, and in which order.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torchweld.errors import UserError
from torchweld.training import packages

LEAST = 3  # items of a user: the last is for the test, the one before for validation
# In a folder, the ratings and the titles beside them.
_PAIRS = (("*.inter", "*.item"), ("u.data", "u.item"), ("ratings.csv", "movies.csv"))
_USER, _ITEM = ("user_id", "userid", "user"), ("item_id", "itemid", "item", "movie_id", "movieid")
_TIME, _RATING = ("timestamp", "time", "date"), ("rating", "score", "stars")
_TITLE, _YEAR = ("title", "movie_title", "name", "item_name"), ("release_year", "year")


@dataclass(frozen=True)
class Ratings:
    """Histories of users.

    Attributes:
        items: their ids, sorted; an item's number is its place, from 1 on.
        titles: of each of `items`.
        histories: the numbers of what each user had, oldest first.
        dropped: how many users had fewer than `LEAST` items.
        learned: from how many users is learned; None for all. All are tested.
    """

    items: tuple[str, ...]
    titles: tuple[str, ...]
    histories: list[list[int]]
    dropped: int
    learned: int | None = None

    @property
    def digest(self) -> str:
        """As in `Data`."""
        return hashlib.sha256(json.dumps([self.items, self.titles, self.histories]).encode()).hexdigest()

    @property
    def files(self) -> Mapping[str, str]:
        """As in `Data`: what the model's numbers stand for."""
        items = [{"id": id, "title": title} for id, title in zip(self.items, self.titles, strict=True)]
        return {"items.json": json.dumps(items, ensure_ascii=False, indent=1) + "\n"}

    @property
    def training(self) -> list[list[int]]:
        """The histories that are learned from, without the last two items."""
        return [history[:-2] for history in self.histories[: self.learned]]


def load(data: Sequence[str] | None) -> Ratings:
    """The ratings of the files, or of the folder, that --data names; without one MovieLens', if they are here.

    Raises:
        UserError: they cannot be read, or are not here.
    """
    paths = [Path(path) for path in data] if data else [packages.find("ml-100k")]
    if len(paths) == 1 and paths[0].is_dir():
        paths = _in_folder(paths[0])
    if len(paths) > 2:
        raise UserError(f"--data: expected a file of ratings and one of titles, but got {len(paths)} files")
    return read(paths[0], paths[1] if len(paths) == 2 else None)


def _in_folder(folder: Path) -> list[Path]:
    for ratings, titles in _PAIRS:
        if found := sorted(folder.glob(ratings)):
            return [found[0], *sorted(folder.glob(titles))[:1]]
    raise UserError(
        f"--data {folder}: expected a folder with {', '.join(ratings for ratings, _ in _PAIRS)} in it, but got none; "
        f"name the file itself"
    )


def read(path: Path, of_titles: Path | None = None) -> Ratings:
    """The histories in a file of ratings, with titles from another one.

    Raises:
        UserError: a file cannot be read, lacks a column, or leaves too few users.
    """
    seen: dict[str, list[tuple[float, str]]] = {}
    rows = _rows(path)
    first = next(rows)[1]
    columns = _columns(path, first)
    if columns is None:  # u.data: user, item, rating, time
        columns, rows = (0, 1, 2, 3), _rows(path)
    for line, row in rows:
        user, item, rating, when = (row[at] if 0 <= at < len(row) else "" for at in columns)
        if not user or not item:
            raise UserError(f"--data {path}, line {line}: expected a user and an item, but got {row!r}")
        for name, value, at in (("rating", rating, columns[2]), ("time", when, columns[3])):
            if at >= 0 and not _finite(value):
                raise UserError(f"--data {path}, line {line}: expected a number as {name}, but got {value!r}")
        seen.setdefault(user, []).append((float(when or 0), item))
    kept = {user: history for user, history in seen.items() if len(history) >= LEAST}
    items = tuple(sorted({item for history in kept.values() for _, item in history}, key=_natural))
    if len(kept) < 2 or len(items) < 2:
        raise UserError(
            f"--data {path}: expected at least 2 users with {LEAST} or more items each, but got {len(kept)} of "
            f"{len(seen)}"
        )
    numbers = {item: i for i, item in enumerate(items, 1)}
    # Where times are equal the order is that of the file.
    histories = [
        [numbers[item] for _, item in sorted(kept[user], key=lambda one: one[0])] for user in sorted(kept, key=_natural)
    ]
    names = _titles(of_titles) if of_titles else {}
    return Ratings(items, tuple(names.get(item, item) for item in items), histories, len(seen) - len(kept))


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, columns) of each line that is not empty; between tabs, bars or commas."""
    try:
        contents = path.read_bytes()
    except OSError as error:
        raise UserError(f"--data {path}: expected a readable file, but got: {error.strerror}") from None
    try:
        text = contents.decode("utf-8-sig")
    except UnicodeDecodeError:  # MovieLens of 1998
        text = contents.decode("latin-1")
    lines = text.splitlines()
    if not lines or "\0" in text:
        raise UserError(f"--data {path}: expected lines of text, but got {'a binary file' if lines else 'none'}")
    mark = next((mark for mark in ("\t", "|") if mark in lines[0]), ",")
    # Between tabs a quotation mark is a character like any other.
    rows = csv.reader(lines) if mark == "," else (line.split(mark) for line in lines)
    for line, row in enumerate(rows, 1):
        if any(row):
            yield line, [cell.strip() for cell in row]


def _columns(path: Path, first: list[str]) -> tuple[int, int, int, int] | None:
    """Places of user, item, rating and time by the names in the first line, -1 for none; None if it has no names."""
    if len(first) == 4 and all(map(_finite, first)):
        return None
    user, item, rating, when = (_place(first, names) for names in (_USER, _ITEM, _RATING, _TIME))
    if min(user, item) < 0:
        missing = "user_id" if user < 0 else "item_id"
        raise UserError(
            f"--data {path}: expected a column {missing!r} in its first line, but got {', '.join(map(repr, first[:8]))}"
        )
    return user, item, rating, when


def _place(names: list[str], wanted: Sequence[str]) -> int:
    """Where one of the wanted names is; RecBole writes a type behind each. -1 if there is none."""
    plain = [name.partition(":")[0].lower() for name in names]
    return next((plain.index(name) for name in wanted if name in plain), -1)


def _titles(path: Path) -> dict[str, str]:
    """From an item's id to its title, with its year where that has a column of its own."""
    rows = _rows(path)
    first = next(rows)[1]
    item, title, year = (_place(first, names) for names in (_ITEM, _TITLE, _YEAR))
    if min(item, title) < 0:  # u.item: the first two columns
        item, title, year, rows = 0, 1, -1, _rows(path)
    found = {}
    for line, row in rows:
        if len(row) <= max(item, title, year):
            raise UserError(f"--data {path}, line {line}: expected an item and its title, but got {row!r}")
        found[row[item]] = f"{row[title]} ({row[year]})" if year >= 0 and row[year] else row[title]
    return found


def _finite(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _natural(text: str) -> tuple[int, str]:
    """Numbers in their order, before names."""
    return (int(text), "") if text.isdecimal() else (2**63, text)
