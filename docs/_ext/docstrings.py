"""Docstrings as they are written here: plain text in which `*` and `|` mean themselves, not markup."""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

BEFORE_NAPOLEON = 400
_CODE = re.compile(r"(`+[^`]+`+)")


def escape(_app: Sphinx, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Puts a backslash before each `*` and `|` that stands outside of backticks."""
    for i, line in enumerate(lines):
        parts = _CODE.split(line)
        parts[::2] = [re.sub(r"([*|])", r"\\\1", part) for part in parts[::2]]
        lines[i] = "".join(parts)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", escape, priority=BEFORE_NAPOLEON)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
