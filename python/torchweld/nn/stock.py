"""torch's own scaled_dot_product_attention, and whether somebody has put another in its place."""

from __future__ import annotations

import torch.nn.functional as F

from torchweld import _torch

STOCK = _torch.scaled_dot_product_attention


def is_replaced() -> bool:
    """Whether `F.scaled_dot_product_attention` is somebody else's now, as it is inside torch's `context_parallel`.

    What would have called it must go on to do so, or attention would see this rank's keys only.
    """
    return F.scaled_dot_product_attention is not STOCK
