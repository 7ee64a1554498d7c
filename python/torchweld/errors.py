"""The one error that the command line shows without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Something that the caller can put right; the message names what was expected, what came, and the remedy."""
