"""The checkouts of the benchmark suites: $TORCHWELD_SUITES has a folder for each, by its name on GitHub."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

Checkout = Callable[[str], Path]


@pytest.fixture
def checkout() -> Checkout:
    """The folder of a suite; the test skips where there is none."""

    def find(name: str) -> Path:
        path = Path(os.environ.get("TORCHWELD_SUITES", "")) / name
        if not os.environ.get("TORCHWELD_SUITES") or not path.is_dir():
            pytest.skip(f"no checkout of {name} in $TORCHWELD_SUITES")
        return path

    return find
