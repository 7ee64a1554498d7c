"""The rule that results have the same bits at any number of threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def hold_bits(run: Callable[[], Sequence[Tensor]]) -> None:
    """The tensors of `run()` on one thread, on several, and once more."""
    before = torch.get_num_threads()
    try:
        found = []
        for count in (1, 1, 2, 3, 5, 2):
            torch.set_num_threads(count)
            found.append(run())
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
