"""How the tests of training call the command line."""

from __future__ import annotations

from collections.abc import Callable

# From the words of a command to its exit code, stdout and stderr.
Run = Callable[..., tuple[int, str, str]]
