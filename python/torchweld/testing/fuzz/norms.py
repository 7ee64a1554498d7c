"""Draws cases of the norms: layer_norm, rms_norm, and both with dropout and a residual in front."""

from __future__ import annotations

from typing import Any

import torch

from torchweld.testing.fuzz.draw import FEW, FLOATS, LONG, MANY, TILES, VECTORS, Draw
from torchweld.testing.fuzz.trial import Judged
from torchweld.testing.inputs import LAYOUTS, VALUES
from torchweld.testing.layer_norm import LayerNormCase


def _shape(draw: Draw) -> dict[str, Any]:
    cols = draw.size(FEW, VECTORS, TILES, MANY, LONG, (5000, 8192, 9001))
    shape = draw.one((cols,), (cols,), (2, cols), (3, 1, cols)) if cols < 700 else (cols,)
    rows = draw.one((draw.size(FEW, *((VECTORS,) if cols < 5000 else ())),), (draw.size(FEW), draw.one(1, 2, 3)))
    return {"rows": rows if cols > 130 else draw.one(rows, (draw.size(TILES, MANY),)), "shape": shape}


def norms(draw: Draw) -> Judged:
    dtype = draw.one(*FLOATS)
    half = dtype is torch.float16
    add = draw.chance(0.5)
    pool: dict[str, Any] = {
        "rms": lambda: {"rms": True},
        "zero-centred": lambda: {"rms": True, "zero_centered": True},
        "no weight": lambda: {"weight": False, "zero_centered": False},
        "no bias": lambda: {"bias": False},
        "parameters": lambda: {"weight_dtype": draw.one(*FLOATS)},
        "layout": lambda: {"layout": draw.one(*LAYOUTS)},
        "scale": lambda: {"scale": draw.one(1e-6, 1e-3, 0.0, 100.0, *(() if half else (1e4, 1e9)))},
        "shift": lambda: {"shift": draw.one(3.0, 100.0, 1e3, *(() if half else (1e4, 1e6)))},
        "values": lambda: {
            "values": draw.one(*(v for v in VALUES if not half or v in ("normal", "zeros", "constant")))
        },
        "huge row": lambda: {"huge_row": not half},
        "eps": lambda: {"eps": draw.one(1e-12, 1e-6, 0.1)},
    }
    if add:
        pool |= {
            "dropout": lambda: {"dropout_p": draw.one(0.1, 0.5, 1.0)},
            "wide residual": lambda: {"residual_dtype": torch.float32},
        }
    fields = _shape(draw) | {"add": add} | draw.options(pool)
    if fields.get("rms") and not fields.get("weight", True):
        fields["zero_centered"] = False
    case = LayerNormCase(name=f"number {draw.number}", regime="", **fields)
    return Judged(case=case, dtype=dtype, seed=draw.seed(), inference=draw.chance(0.2))
