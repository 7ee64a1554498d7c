"""ARCHITECTURE.md: every path on it exists, and every name beside a path is in that file."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SPAN = re.compile(r"`([^`\n]+)`(?:\s+`([^`\n]+)`)?")
PATH = re.compile(r"(?:csrc|python|tests|docs|bench)/[\w./]+|\w+\.(?:md|txt|toml)")


def problems(page: str) -> list[str]:
    """Paths that do not exist, and names that are not in the file before them."""
    prose = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    found = []
    for path, name in SPAN.findall(prose):
        if not PATH.fullmatch(path):
            continue
        file = ROOT / path
        if not file.exists():
            found.append(path)
        elif name and not PATH.fullmatch(name) and not re.search(rf"\b{re.escape(name)}\b", file.read_text()):
            found.append(f"{path} {name}")
    return found


def test_the_page_speaks_of_what_is_there() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text()
    assert problems(page) == []
    assert sum(bool(PATH.fullmatch(path)) for path, _ in SPAN.findall(page)) > 30


def test_what_is_not_there_is_found() -> None:
    assert problems("`csrc/philox.h` `Dropout`, `csrc/none.h` and `csrc/philox.h`\n`Nothing`") == [
        "csrc/none.h",
        "csrc/philox.h Nothing",
    ]
