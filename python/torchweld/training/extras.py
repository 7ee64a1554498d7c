"""Libraries that some options need and that an installation may lack."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from torchweld.errors import UserError


def needed(module: str, library: str, extra: str, purpose: str) -> ModuleType:
    """The module, of a library that the optional extra brings.

    Raises:
        UserError: it is not installed.
    """
    if find_spec(module.partition(".")[0]) is None:
        raise UserError(f"{purpose} needs {library}: pip install torchweld[{extra}]")
    return import_module(module)
