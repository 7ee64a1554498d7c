"""Parts of a longer attention on the CPU's kernels."""

from __future__ import annotations

import pytest

from attention_parts import WINDOWS, check_mask, check_offset, check_part


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
def test_offset(isa: str, window: tuple[int | None, int | None], alibi: bool) -> None:
    check_offset(window, alibi)


def test_mask(isa: str) -> None:
    check_mask()


def test_part(isa: str) -> None:
    check_part()
