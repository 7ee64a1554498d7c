"""Lines of a file or of standard input, a few at a time; and a line for each file that a model has seen."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import StringIO, TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import TextIO

from torch import Tensor

from torchweld.errors import UserError

AT_ONCE = 64


def batches(lines: TextIO) -> Iterator[list[str]]:
    """The lines without their ends: one by one from a terminal, where someone waits for the answer to each."""
    at_once = 1 if lines.isatty() else AT_ONCE
    while batch := [line.rstrip("\r\n") for line in islice(lines, at_once)]:
        yield batch


def check_unicode(place: str, texts: Iterable[str]) -> None:
    """Raises UserError where a text has halves of characters: bytes of the command line, or what JSON can say."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise UserError(f"{place}: expected text in Unicode (UTF-8 in a terminal), but got other bytes") from None


@contextmanager
def opened(path: str) -> Iterator[TextIO]:
    """The file at `path` as UTF-8 text; standard input for "-"."""
    if path == "-":
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        yield sys.stdin
        return
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"FILE {path}: expected a readable text file, but got: {error.strerror}") from None
    yield StringIO(lines)


def tell(files: Sequence[str], logits: Tensor, labels: Sequence[str], as_json: bool) -> None:
    """Writes the likeliest label of each file, its probability and the name, with tabs between them, or as JSON."""
    for path, row in zip(files, logits.softmax(1), strict=True):
        best = int(row.argmax())
        answer = {"label": labels[best], "probability": round(row[best].item(), 4)}
        if as_json:
            sys.stdout.write(json.dumps({"file": path, **answer}, ensure_ascii=False) + "\n")
        else:
            sys.stdout.write("\t".join([*map(str, answer.values()), path]) + "\n")
