"""`--dataset NAME[:CONFIG]`: a data set that Hugging Face's `datasets` loads, as a file that a program reads.

The file is in the cache under a hash of its contents, so a run goes on from it without the network. Programs split what
they are given by themselves: the data set's part `train` is taken, or its only one.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchweld.errors import UserError
from torchweld.files import write_text
from torchweld.training.corpus import cache_directory
from torchweld.training.extras import needed

TRAIN = "train"
SHOWN = 8  # names of columns in an error


@dataclass(frozen=True)
class Table:
    """A part of a data set. `name`: as on the command line; rows: of the library."""

    name: str
    part: str
    rows: Any

    def column(self, wanted: str, option: str) -> str:
        """The column of that name.

        Raises:
            UserError: there is none.
        """
        if wanted not in self.rows.column_names:
            names = ", ".join(map(repr, self.rows.column_names[:SHOWN]))
            raise UserError(f"--dataset {self.name}: expected a column {wanted!r}, but got {names}{option}")
        return wanted

    def simple(self, dtypes: tuple[str, ...]) -> list[str]:
        """The columns with one value a row, of a dtype that begins as one of these."""
        kinds = self.rows.features.items()
        return [name for name, kind in kinds if str(getattr(kind, "dtype", "")).startswith(dtypes)]

    def values(self, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        """These columns of each row that has a value in all of them."""
        for row in self.rows.select_columns(list(columns)):
            found = tuple(row[column] for column in columns)
            if not any(value is None for value in found):
                yield found


def load(dataset: str, program: str, options: Mapping[str, str | None]) -> tuple[str, str]:
    """The file for a program, and a line on what is in it. `options`: the program's own.

    Raises:
        UserError: the library is missing, the program reads no such data, or they cannot be had.
    """
    if program not in _WRITERS:
        raise UserError(
            f"--dataset: expected a program that learns from text or ratings, one of {', '.join(_WRITERS)}, but got "
            f"{program}; name files with --data"
        )
    library = needed("datasets", "datasets", "hub", "--dataset")
    table = _loaded(library, dataset)
    suffix, contents = _WRITERS[program](table, options)
    if not contents.strip():
        raise UserError(f"--dataset {dataset}: expected rows with values in the columns, but got none")
    plain = re.sub(r"\W+", "-", dataset).strip("-")[-60:]
    path = cache_directory() / "hub" / f"{plain}-{hashlib.sha256(contents.encode()).hexdigest()[:16]}{suffix}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--dataset {dataset}: expected to write {path.parent}, but got: {error.strerror}") from None
    write_text(path, contents)
    return str(path), f"dataset: {dataset}, {len(table.rows):,} rows of its part {table.part}, in {path}"


def _loaded(library: Any, dataset: str) -> Table:
    name, _, config = dataset.partition(":") if not Path(dataset).exists() else (dataset, "", "")
    if not name:
        raise UserError(f"--dataset: expected NAME or NAME:CONFIG, but got {dataset!r}")
    try:
        found = library.load_dataset(name, config or None)
    except ConnectionError as error:
        raise UserError(
            f"--dataset {dataset}: expected the network, the library's cache or a local folder, but got: "
            f"{_first_line(error)}; try again with a network, or name files with --data"
        ) from None
    except Exception as error:  # of the library, of the hub's client, of what reads the files
        raise UserError(
            f"--dataset {dataset}: expected a data set of Hugging Face or a local folder, but got: "
            f"{_first_line(error)}; see https://huggingface.co/datasets, or name files with --data"
        ) from None
    if TRAIN not in found and len(found) != 1:
        raise UserError(f"--dataset {dataset}: expected a part {TRAIN!r}, but got {', '.join(map(repr, found))}")
    part = TRAIN if TRAIN in found else next(iter(found))
    return Table(dataset, part, found[part])


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _text(table: Table, options: Mapping[str, str | None]) -> tuple[str, str]:
    """Running text: the column `text`, or the only one of strings, row after row."""
    strings = table.simple(("string", "large_string"))
    column = strings[0] if len(strings) == 1 else table.column("text", "")
    return ".txt", "".join(text if text.endswith("\n") else f"{text}\n" for (text,) in table.values([column]))


def _labelled(table: Table, options: Mapping[str, str | None]) -> tuple[str, str]:
    """Texts with labels by their names, under the columns' own names."""
    names = [options.get(option) or option for option in ("text", "label")]
    columns = [table.column(name, "; name the columns with --text and --label") for name in names]
    labels = getattr(table.rows.features[columns[1]], "names", None)
    lines = []
    for text, label in table.values(columns):
        if labels is None or label >= 0:  # -1: not known
            row = {columns[0]: text, columns[1]: label if labels is None else labels[label]}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return ".jsonl", "".join(lines)


def _pairs(table: Table, options: Mapping[str, str | None]) -> tuple[str, str]:
    """The columns of the languages, or those within `translation`, as in the data sets of WMT and OPUS."""
    languages = [options.get(f"{side}_language") or language for side, language in (("source", "en"), ("target", "de"))]
    remedy = "; choose with --source-language and --target-language"
    if "translation" in table.rows.column_names:
        found: Any = (value for (value,) in table.values(["translation"]))
    else:
        columns = [table.column(language, remedy) for language in languages]
        found = (dict(zip(columns, row, strict=True)) for row in table.values(columns))
    lines = []
    for pair in found:
        if missing := [language for language in languages if not isinstance(pair.get(language), str)]:
            names = ", ".join(map(repr, pair))
            raise UserError(f"--dataset {table.name}: expected a text in {missing[0]!r}, but got {names}{remedy}")
        lines.append("\t".join(" ".join(pair[language].split()) for language in languages) + "\n")
    return ".tsv", "".join(lines)


def _ratings(table: Table, options: Mapping[str, str | None]) -> tuple[str, str]:
    """All columns with one value a row; the reader of ratings finds its own by name."""
    simple = table.simple(("string", "large_string", "int", "uint", "float", "timestamp", "date"))
    contents = io.StringIO()
    writer = csv.writer(contents, lineterminator="\n")
    writer.writerow(simple)
    writer.writerows([" ".join(str(value).split()) for value in row] for row in table.values(simple))
    return ".csv", contents.getvalue()


_WRITERS: dict[str, Callable[[Table, Mapping[str, str | None]], tuple[str, str]]] = {
    "gpt2": _text,
    "gpt3": _text,
    "bert": _text,
    "seq2seq": _pairs,
    "recommender": _ratings,
    "classify": _labelled,
    "regress": _labelled,
}
