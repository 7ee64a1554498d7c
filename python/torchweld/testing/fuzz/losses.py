"""Draws cases of cross_entropy, of a head's too."""

from __future__ import annotations

import torch

from torchweld.testing.cross_entropy import CrossEntropyCase
from torchweld.testing.fuzz.draw import FEW, FLOATS, LONG, MANY, TILES, VECTORS, Draw
from torchweld.testing.fuzz.trial import Judged
from torchweld.testing.inputs import LAYOUTS, VALUES
from torchweld.testing.linear_cross_entropy import LinearCrossEntropyCase


def cross_entropy(draw: Draw) -> Judged:
    dtype = draw.one(*FLOATS)
    half = dtype is torch.float16
    classes = draw.size(FEW, VECTORS, TILES, MANY, LONG, (50257,), empty=0.0)
    rows = draw.size(FEW, *((VECTORS, TILES) if classes < 1000 else ()))
    pool = {
        "reduction": lambda: {"reduction": draw.one("sum", "none")},
        "smoothing": lambda: {"smoothing": draw.one(0.1, 0.5, 1.0)},
        "ignored": lambda: {"ignored": draw.one(0.1, 0.5, 1.0)},
        "masked": lambda: {"masked": draw.one(0.1, 0.9), "smoothing": 0.0},
        "layout": lambda: {"layout": draw.one(*LAYOUTS)},
        "scale": lambda: {"scale": draw.one(0.0, 1e-3, 100.0, *(() if half else (1e4, 1e9)))},
        "shift": lambda: {"shift": draw.one(100.0, -1e3, *(() if half else (1e4, -1e6)))},
        "values": lambda: {
            "values": draw.one(*(v for v in VALUES if not half or v in ("normal", "zeros", "constant")))
        },
        "weight": lambda: {"weight": draw.one(*FLOATS)},
        "soft": lambda: {"soft": draw.one(*FLOATS), "ignored": 0.0, "masked": 0.0},
        "inner": lambda: {"inner": draw.one((1,), (3,), (2, 2)), "layout": "contiguous"},
    }
    case = CrossEntropyCase(name=f"number {draw.number}", regime="", rows=rows, classes=classes, **draw.options(pool))  # type: ignore[arg-type]
    return Judged(case=case, dtype=dtype, seed=draw.seed(), inference=draw.chance(0.2))


def linear_cross_entropy(draw: Draw) -> Judged:
    dtype = draw.one(*FLOATS)
    features, classes = draw.size(FEW, VECTORS, TILES, empty=0.0), draw.size(FEW, VECTORS, TILES, MANY, LONG, empty=0.0)
    rows = draw.size(FEW, VECTORS, TILES, *((MANY, LONG) if classes < 600 else ()))
    pool = {
        "rows": lambda: {"rows": (draw.one(1, 2, 3), draw.one(2, 5, 17)), "shift": draw.chance(0.7)},
        "bias": lambda: {"bias": True},
        "reduction": lambda: {"reduction": draw.one("sum", "none")},
        "smoothing": lambda: {"smoothing": draw.one(0.1, 0.5, 1.0)},
        "softcap": lambda: {"softcap": draw.one(0.5, 3.0, 30.0)},
        "z_loss": lambda: {"z_loss": draw.one(1e-4, 0.1)},
        "ignored": lambda: {"ignored": draw.one(0.1, 0.5, 1.0)},
        "layout": lambda: {"layout": draw.one(*LAYOUTS)},
        "scale": lambda: {"scale": draw.one(0.0, 1e-3, 30.0)},
        "head": lambda: {"wide_weight": True},
        "wanted": lambda: {"wanted": draw.one(("input",), ("weight",), ("input", "weight"), ("weight", "bias"))},
    }
    sizes = {"rows": (rows,), "features": features, "classes": classes}
    case = LinearCrossEntropyCase(name=f"number {draw.number}", regime="", **sizes | draw.options(pool))  # type: ignore[arg-type]
    return Judged(case=case, dtype=dtype, seed=draw.seed(), inference=draw.chance(0.2))
