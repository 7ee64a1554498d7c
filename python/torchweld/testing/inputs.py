"""Random tensors by seed, in memory that shows when a kernel reads past them."""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "unaligned", "strided", "transposed")
_MARGIN = 64  # elements of NaN on each side: a vector of the widest instruction set


def place(values: Tensor, layout: str) -> Tensor:
    """`values`, copied into the middle of memory full of NaN.

    "contiguous" starts at an aligned address and "unaligned" one element past it; "strided" takes every second element
    of longer rows; "transposed" has its last two dimensions swapped in memory.
    """
    if layout == "transposed":
        return place(values.mT.contiguous(), "contiguous").mT
    if layout == "strided":
        wide = values.new_full((*values.shape[:-1], 2 * values.shape[-1] + 1), torch.nan)
        view = wide[..., 1::2]
    else:
        start = _MARGIN + (1 if layout == "unaligned" else 0)
        flat = values.new_full((values.numel() + 2 * _MARGIN + 1,), torch.nan)
        view = flat[start : start + values.numel()].view(values.shape)
    return view.copy_(values)


class Random:
    """A stream of tensors that depends only on the seed, the device type and the shapes."""

    def __init__(self, seed: int, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def normal(
        self,
        *shape: int,
        dtype: torch.dtype = torch.float32,
        scale: float = 1.0,
        shift: float = 0.0,
        layout: str = "contiguous",
    ) -> Tensor:
        """Normal numbers with standard deviation `scale` and mean `shift`."""
        values = torch.randn(shape, generator=self.generator, device=self.device)
        return place(values.mul_(scale).add_(shift).to(dtype), layout)

    def chance(self, *shape: int, probability: float) -> Tensor:
        """Booleans, True with this probability."""
        return torch.rand(shape, generator=self.generator, device=self.device) < probability


# Kinds of rows: as drawn, or the worst for a sum, a mean or a maximum.
VALUES = ("normal", "zeros", "constant", "constant rows", "shifted", "one outlier", "one huge row", "integers")


def shape_values(t: Tensor, kind: str) -> Tensor:
    """Changes normal numbers (..., rows, columns) in place to one of `VALUES`, of the same magnitude or more."""
    if t.numel() == 0 or kind == "normal":
        return t
    if kind == "zeros":
        t.zero_()
    elif kind == "constant":
        t.fill_(t.flatten()[0].clone())
    elif kind == "constant rows":
        t.copy_(t[..., :1].clone().expand_as(t))
    elif kind == "shifted":
        t.add_(30 * t.abs().max())
    elif kind == "one outlier":
        t[tuple(n // 2 for n in t.shape)] *= 1000
    elif kind == "one huge row":
        (t[..., -1, :] if t.dim() > 1 else t[-1:]).mul_(1000)
    else:
        t.round_()
    return t


# Which keys a mask hides: at random with a row that has none, padding on the left or right as long as the row but one,
# sequences beside each other, every second row wholly, and everything.
HIDDEN = ("scattered", "left", "right", "blocks", "rows", "all")


def hidden(shape: tuple[int, ...], kind: str, random: Random) -> Tensor:
    """Boolean, True where a key is hidden, of shape (..., Nq, Nk) or one that broadcasts to it."""
    rows, keys = (torch.arange(n, device=random.device) for n in shape[-2:])
    if kind == "scattered":
        return random.chance(*shape, probability=0.4) | (rows == 0).unsqueeze(1)
    lengths = (torch.rand(shape[:-2], generator=random.generator, device=random.device) * shape[-1]).long()
    if kind == "left":
        found = keys < lengths[..., None, None]
    elif kind == "right":
        found = keys >= 1 + lengths[..., None, None]
    elif kind == "blocks":
        found = (rows * 3 // max(shape[-2], 1)).unsqueeze(1) != keys * 3 // max(shape[-1], 1)
    else:
        found = ((rows % 2 == 1) | (kind == "all")).unsqueeze(1)
    return found.expand(shape)
