"""torch's own scaled_dot_product_attention, and whether another function has replaced it."""

from __future__ import annotations

import torch.nn.functional as F

from torchweld import _torch

STOCK = _torch.scaled_dot_product_attention


def is_replaced() -> bool:
    """Whether another function has replaced `F.scaled_dot_product_attention`, as torch's `context_parallel` does.

    A module that calls F.scaled_dot_product_attention must then go on to call it. Without the replacement attention
    would see the keys of this rank alone.
    """
    return F.scaled_dot_product_attention is not STOCK
