"""Draws cases of dropout, of gelu, of the gated units and of rotary_embedding."""

from __future__ import annotations

import torch

from torchweld.testing.dropout import DropoutCase
from torchweld.testing.fuzz.draw import FEW, FLOATS, LONG, MANY, TILES, VECTORS, Draw, Options
from torchweld.testing.fuzz.trial import Judged
from torchweld.testing.gated import GatedCase
from torchweld.testing.gelu import GeluCase
from torchweld.testing.inputs import LAYOUTS, VALUES
from torchweld.testing.rotary_embedding import RotaryCase


def dropout(draw: Draw) -> Judged:
    sizes = draw.size(FEW, VECTORS, TILES, MANY, LONG, (8193,)), draw.one(1, 2, 3, 9)
    pool: Options = {
        "rows": lambda: {"shape": sizes[::-1]},
        "layout": lambda: {"layout": draw.one(*LAYOUTS), "shape": sizes},
        "p": lambda: {"p": draw.one(1e-9, 0.1, 0.5, 0.999, 1.0)},
        "values": lambda: {"values": draw.one(*VALUES)},
    }
    options = {"shape": sizes[:1]} | draw.options(pool)
    case = DropoutCase(name=f"number {draw.number}", regime="", **options)
    return Judged(case=case, dtype=draw.one(*FLOATS), seed=draw.seed(), inference=draw.chance(0.2))


def gelu(draw: Draw) -> Judged:
    dtype = draw.one(*FLOATS)
    sizes = draw.size(FEW, VECTORS, TILES, MANY, LONG, (16385,)), draw.one(1, 2, 3, 9)
    pool = {
        "rows": lambda: {"shape": sizes[::-1]},
        "layout": lambda: {"layout": draw.one(*LAYOUTS), "shape": sizes},
        "scale": lambda: {"scale": draw.one(1e-30, 1e-3, 30.0, 1e4, *(() if dtype is torch.float16 else (1e19, 1e38)))},
        "values": lambda: {"values": draw.one(*VALUES)},
    }
    case = GeluCase(name=f"number {draw.number}", regime="", **({"shape": sizes[:1]} | draw.options(pool)))  # type: ignore[arg-type]
    return Judged(case=case, dtype=dtype, seed=draw.seed(), inference=draw.chance(0.2))


def gated(draw: Draw) -> Judged:
    dtype = draw.one(*FLOATS)
    pool: Options
    sizes = draw.size(FEW, VECTORS, TILES, MANY, LONG, (16385,)), draw.one(1, 2, 3, 9)
    pool = {
        "rows": lambda: {"shape": sizes[::-1]},
        "packed": lambda: {"packed": True, "shape": sizes[::-1]},
        "layout": lambda: {"layout": draw.one(*LAYOUTS), "shape": sizes},
        "scale": lambda: {"scale": draw.one(1e-30, 1e-3, 30.0, *(() if dtype is torch.float16 else (1e4, 1e15)))},
        "values": lambda: {"values": draw.one("normal", "zeros", "constant", "integers")},
    }
    options = {"shape": sizes[:1], "activation": draw.one("silu", "none", "tanh")} | draw.options(pool)
    case = GatedCase(name=f"number {draw.number}", regime="", **options)
    return Judged(case=case, dtype=dtype, seed=draw.seed(), inference=draw.chance(0.2))


def rotary_embedding(draw: Draw) -> Judged:
    dtype = draw.one(*FLOATS)
    dim = 2 * draw.size(FEW, VECTORS, (20, 40, 64), empty=0.0)
    sizes = {
        "batch": draw.one(1, 2, 3),
        "heads": draw.one(1, 2, 5),
        "kv_heads": draw.one(0, 1, 3),
        "tokens": draw.size(FEW, VECTORS, (33, 65)),
        "dim": dim,
    }
    pool = {
        "interleaved": lambda: {"interleaved": True},
        "partial": lambda: {"rotary_dim": 2 * draw.one(1, max(dim // 4, 1), max(dim // 2 - 1, 1))},
        "seq_dim": lambda: {"seq_dim": -3},
        "layout": lambda: {"layout": draw.one(*LAYOUTS)},
        "positions": lambda: {"positions": draw.one(1, 17, 5000)},
        "batched": lambda: {"batched": True},
        "columns": lambda: {"columns": draw.one("pair", "independent")},
        "table": lambda: {"table": draw.one(*FLOATS)},
        "scale": lambda: {"scale": draw.one(1e-30, 1e-3, 1e4, *(() if dtype is torch.float16 else (1e19,)))},
    }
    case = RotaryCase(name=f"number {draw.number}", regime="", **(sizes | draw.options(pool)))  # type: ignore[arg-type]
    return Judged(case=case, dtype=dtype, seed=draw.seed(), inference=draw.chance(0.2))
