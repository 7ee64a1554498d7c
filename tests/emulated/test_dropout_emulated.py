"""The CUDA kernel of dropout on the emulated GPU (tests/emulation): the definition's mask, every size of a tail."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from torchweld import reference

NAN = float("nan")
SEED = torch.tensor([-0x123456789ABCDEF])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tails_and_tiles(emulated: ModuleType, dtype: torch.dtype) -> None:
    """Each element is written once, and nothing beside the tensor, wherever rows begin and end."""
    vector = 16 // dtype.itemsize
    tile = 512 * vector
    for shape in ((1, 1), (3, vector - 1), (5, 3 * vector), (3, 5 * vector + 1), (1, tile), (3, 2 * tile // 3 + 1), ()):
        for offset in (0, 1):
            numel = torch.Size(shape).numel()
            x = torch.randn(numel + offset).to(dtype)[offset:].view(shape)
            whole = torch.full((numel + offset + 1,), NAN, dtype=dtype)
            y = whole[offset:-1].view(shape)
            emulated.dropout(input=x, seed=SEED, p=0.3, output=y)
            assert whole[:offset].isnan().all() and whole[-1].isnan()
            assert torch.equal(y, reference.dropout(x, 0.3, seed=SEED)), (shape, offset)


def test_what_is_dropped_is_multiplied_by_zero(emulated: ModuleType) -> None:
    x = torch.tensor([NAN, float("inf"), -1.0, 2.0] * 8)
    for p in (0.5, 1.0):
        y = torch.empty_like(x)
        emulated.dropout(input=x, seed=SEED, p=p, output=y)
        assert torch.equal(y.nan_to_num(7.0), reference.dropout(x, p, seed=SEED).nan_to_num(7.0))
