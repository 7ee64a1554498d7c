"""The console that the command line prints tables to."""

from __future__ import annotations

import sys

from rich.console import Console


def console() -> Console:
    """A console with the terminal's width, or for a file or a pipe one that is wide enough for every table."""
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)
