"""The one error that the command line shows without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """An error that the user can correct. Its message names what was expected, what came, and the remedy."""
