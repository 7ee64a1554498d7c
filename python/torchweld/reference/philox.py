"""Dropout masks by counting: Philox4x32-10 (Salmon et al.: Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011)."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of 32-bit numbers. int64 cannot hold it, so the high half uses 16-bit parts."""
    low, high = a & 0xFFFF, a >> 16
    b_low, b_high = b & 0xFFFF, b >> 16
    middle = high * b_low + (low * b_low >> 16)
    carry = (middle & 0xFFFF) + low * b_high
    return high * b_high + (middle >> 16) + (carry >> 16), (carry << 16 & _LOW) | (low * b_low & 0xFFFF)


def philox(seed: Tensor, rows: Tensor, blocks: Tensor) -> Tensor:
    """Four 32-bit words, as int64, for every row and block of four columns.

    Args:
        seed: int64, one element: the 64-bit key.
        rows, blocks: int64, broadcast together: the counter is (block, low 32 bits of row, high 32 bits of row, 0).

    Returns:
        int64 of the broadcast shape and a last dimension of 4.
    """
    seed = seed.reshape(())
    key0, key1 = seed & _LOW, seed >> 32 & _LOW
    c0, c1, c2 = torch.broadcast_tensors(blocks, rows & _LOW, rows >> 32 & _LOW)
    c3 = torch.zeros_like(c0)
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = key0 + _WEYL[0] & _LOW, key1 + _WEYL[1] & _LOW
    return torch.stack((c0, c1, c2, c3), -1)


def dropout_factors(seed: Tensor, rows: int | Tensor, cols: int, p: float) -> Tensor:
    """The factors of dropout for a matrix: 0 with probability p, else 1 / (1 - p); all 0 if p is 1.

    Element (r, c) depends on the seed, r and c alone: it is dropped where word c % 4 of block c // 4 of row r is below
    p * 2**32.

    Args:
        seed: int64, one element.
        rows: how many rows, or their numbers as an int64 tensor (R).
        cols: how many columns C.

    Returns:
        float64 (R, C), on the seed's device.
    """
    numbers = torch.arange(rows, device=seed.device) if isinstance(rows, int) else rows
    blocks = torch.arange((cols + 3) // 4, device=seed.device)
    words = philox(seed, numbers.unsqueeze(1), blocks).flatten(1)[:, :cols]
    scale = 1.0 / (1.0 - p) if p < 1.0 else 0.0
    return (words >= min(int(p * 2**32 + 0.5), _LOW)).double() * scale


def draw_seed(device: torch.device) -> Tensor:
    """A seed from torch's default generator of the device. `torch.manual_seed` sets it, checkpointing replays it."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
