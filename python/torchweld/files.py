"""Files that are whole or not there."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from torchweld.errors import UserError


def write_text(path: Path, text: str) -> Path:
    """Writes to another name, and renames it.

    Raises:
        UserError: the file cannot be written.
    """
    write_texts({path: text})
    return path


def write_texts(texts: Mapping[Path, str]) -> None:
    """Writes files that belong together: none gets its name before all are written.

    Raises:
        UserError: one cannot be written.
    """
    asides = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in texts}
    try:
        for path, aside in asides.items():
            aside.write_text(texts[path], encoding="utf-8")
        for path in asides:
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        for path, aside in asides.items():
            aside.replace(path)
    except OSError as error:
        raise UserError(
            f"{path}: expected a file that can be written, but got: {error.strerror}; name another one"
        ) from None
    finally:
        for aside in asides.values():
            with suppress(OSError):
                aside.unlink(missing_ok=True)
