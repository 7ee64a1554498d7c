"""Files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

from torchweld.errors import UserError


def write_text(path: Path, text: str) -> Path:
    """Writes to another name, and renames it.

    Raises:
        UserError: the file cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(
            f"{path}: expected a file that can be written, but got: {error.strerror}; name another one"
        ) from None
    return path
