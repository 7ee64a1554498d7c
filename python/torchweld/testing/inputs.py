"""Random tensors by seed, laid out so that a kernel which reads what is not its own shows it."""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "unaligned", "strided", "transposed")
_MARGIN = 64  # elements of NaN on either side: a whole vector of the widest instruction set


def place(values: Tensor, layout: str) -> Tensor:
    """`values` copied into the middle of memory full of NaN.

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
    """A stream of tensors that depends on the seed, the device type and the shapes asked for, and on nothing else."""

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
        """Normal numbers of standard deviation `scale` about `shift`."""
        values = torch.randn(shape, generator=self.generator, device=self.device)
        return place(values.mul_(scale).add_(shift).to(dtype), layout)

    def chance(self, *shape: int, probability: float) -> Tensor:
        """Booleans, True with this probability."""
        return torch.rand(shape, generator=self.generator, device=self.device) < probability
