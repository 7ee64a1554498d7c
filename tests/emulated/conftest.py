"""The fixture of the tests that read machine code."""

from __future__ import annotations

import pytest

import machine_code
from shipped_kernels import Cubin, extract


@pytest.fixture(scope="session")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> list[Cubin]:
    library = machine_code.library()
    assert library is not None
    return extract(library, tmp_path_factory.mktemp("cubins"))
