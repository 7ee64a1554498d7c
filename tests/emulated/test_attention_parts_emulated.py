"""Parts of a longer attention on the CUDA kernels, on the emulated GPU."""

from __future__ import annotations

from types import ModuleType

import pytest

from attention_parts import WINDOWS, check_mask, check_offset, check_part


@pytest.mark.parametrize("window", WINDOWS[1:3])
def test_offset(emulated: ModuleType, window: tuple[int | None, int | None]) -> None:
    check_offset(window, alibi=True)


def test_mask(emulated: ModuleType) -> None:
    check_mask()


def test_part(emulated: ModuleType) -> None:
    check_part()
