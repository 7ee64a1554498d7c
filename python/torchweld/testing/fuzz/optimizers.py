"""Draws steps of the optimizers' ops, and random courses of optimizers held to torch's own, event by event."""

from __future__ import annotations

from typing import Any

import torch

from torchweld.testing.adamw import AdamWCase
from torchweld.testing.fuzz.draw import FEW, LONG, MANY, TILES, VECTORS, Draw
from torchweld.testing.fuzz.lockstep import EVENTS, Lockstep
from torchweld.testing.fuzz.trial import Judged
from torchweld.testing.sgd import SgdCase

_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32


def _common(draw: Draw) -> dict[str, Any]:
    return {
        "layout": lambda: {"layout": draw.one("unaligned", "strided")},
        "updates": lambda: {"updates": draw.one(1, 2, 10)},
        "gradients": lambda: {"grad_scale": draw.one(0.0, 1e-4, 10.0)},
        "maximize": lambda: {"maximize": True},
        "clip": lambda: {"max_grad_norm": draw.one(1e-3, 0.5, 1e3)},
        "wide": lambda: {"state_dtype": _FP32},
        "wide gradients": lambda: {"state_dtype": _FP32, "grad_dtype": _FP32},
        "masters": lambda: {"state_dtype": _FP32, "masters": True},
    }


def _judged(draw: Draw, make: Any, pool: dict[str, Any]) -> Judged:
    sizes = tuple(draw.size(FEW, VECTORS, TILES, MANY, LONG, empty=0.1) for _ in range(draw.one(1, 2, 5, 40)))
    fields = draw.options(pool)
    # float16 holds no square of a small gradient; a float32 parameter has no master.
    narrow = (_BF16, _FP16) if "state_dtype" in fields else (_BF16,)
    dtype = draw.one(*narrow) if fields.get("masters") else draw.one(_FP32, *narrow)
    case = make(name=f"number {draw.number}", regime="", sizes=sizes, **fields)
    return Judged(case=case, dtype=dtype, seed=draw.seed())


def adamw(draw: Draw) -> Judged:
    pool = _common(draw) | {
        "eps": lambda: {"eps": draw.one(1e-3, 0.1)},
        "amsgrad": lambda: {"amsgrad": True},
        "Adam": lambda: {"decoupled": False},
    }
    return _judged(draw, AdamWCase, pool)


def sgd(draw: Draw) -> Judged:
    pool = _common(draw) | {
        "momentum": lambda: {"momentum": draw.one(0.5, 0.99)},
        "dampening": lambda: {"dampening": draw.one(0.1, 0.9)},
        "nesterov": lambda: {"nesterov": True},
        "no momentum": lambda: {"momentum": 0.0},
    }
    return _judged(draw, SgdCase, pool)


def lockstep(draw: Draw) -> Lockstep:
    name = draw.one("AdamW", "Adam", "SGD")
    pool: dict[str, Any] = {
        "lr": lambda: {"lr": draw.one(1e-1, 1e-3, 0.0)},
        "weight_decay": lambda: {"weight_decay": draw.one(0.0, 0.1)},
        "maximize": lambda: {"maximize": True},
        "fused": lambda: {"fused": True},
        "foreach": lambda: {"foreach": True},
        "clip": lambda: {"max_grad_norm": draw.one(0.1, 100.0)},
    }
    if name == "SGD":
        pool |= {
            "momentum": lambda: {"momentum": draw.one(0.5, 0.9)},
            "dampening": lambda: {"momentum": 0.9, "dampening": 0.3},
            "nesterov": lambda: {"momentum": 0.9, "dampening": 0.0, "nesterov": True},
        }
    else:
        pool |= {
            "betas": lambda: {"betas": draw.one((0.0, 0.9), (0.5, 0.99))},
            "eps": lambda: {"eps": draw.one(1e-3, 1e-12)},
            "amsgrad": lambda: {"amsgrad": True},
        }
    fields = draw.options(pool)
    if fields.get("nesterov"):
        fields["dampening"] = 0.0
    dtype = draw.one(_FP32, _FP32, _BF16, _FP16)
    masters = dtype is _FP16 or (dtype is _BF16 and draw.chance(0.6))
    events = tuple(draw.one(*EVENTS, "step", "step", "step", "step") for _ in range(draw.one(3, 5, 8, 12)))
    if dtype is _FP16 and {"scaler", "overflow"} & set(events):
        fields["fused"] = True  # GradScaler itself unscales no float16
    if masters or fields.get("fused"):
        fields.pop("foreach", None)
    return Lockstep(
        name=name,
        options=tuple(fields.items()),
        dtype=dtype,
        masters=masters,
        events=("step", *events),
        seed=draw.seed(),
    )
