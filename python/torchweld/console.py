"""Where the command line's tables go."""

from __future__ import annotations

import sys

from rich.console import Console


def console() -> Console:
    """A terminal gets its own width; a file or a pipe one that no table has to be broken for."""
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)
