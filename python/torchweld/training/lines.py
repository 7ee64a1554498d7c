"""Lines of a file or of standard input, a few at a time."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import StringIO, TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import TextIO

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
