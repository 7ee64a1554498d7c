"""Logits that no model should have, and what cross_entropy makes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchweld import ops

INFINITY = float("inf")

each_logits = pytest.mark.parametrize(
    "logits",
    [
        [0.0, -INFINITY, 1.0],
        [-INFINITY, 0.0, 1.0],
        [-INFINITY, -INFINITY, -INFINITY],
        [INFINITY, 0.0, 1.0],
        [INFINITY, INFINITY, 1.0],
        [float("nan"), 0.0, 1.0],
        [1e30, -1e30, 0.0],
        [3e38, -3e38, 0.0],
        [-3e38, 3e38, 3e38],
    ],
    ids=str,
)


def hold_to_torch(logits: list[float], smoothing: float, classes: int) -> None:
    """Loss and gradient are torch's: infinities, NaN and all. Of many classes most are equal."""
    row = [*logits, *[logits[1]] * (classes - 3)]
    for ignore_index in (-100, 0):
        found: list[Tensor] = []
        expected: list[Tensor] = []
        for function, into in ((ops.cross_entropy, found), (F.cross_entropy, expected)):
            x = torch.tensor([row, [float(i % 7) for i in range(classes)]], requires_grad=True)
            options: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": smoothing, "reduction": "none"}
            loss = function(x, torch.tensor([0, 2]), **options)
            into += [loss.detach(), *torch.autograd.grad(loss[0] + loss[1], x)]
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, equal_nan=True)
