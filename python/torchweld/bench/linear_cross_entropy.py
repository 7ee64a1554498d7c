"""The head of GPT-2 and its loss, 768 features into 50257 classes: forward, and forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch.nn import functional as F

from torchweld import backend
from torchweld.bench.functional import compiled
from torchweld.bench.harness import Call, Settings, Work
from torchweld.testing import Oracle, confirm
from torchweld.testing.case import Provider, Tensors
from torchweld.testing.linear_cross_entropy import LinearCrossEntropyCase

_CHECKED_ROWS = 64  # the definition holds all logits in float64
CASE = LinearCrossEntropyCase(name="", regime="bench", rows=(4096,), features=768, classes=50257)


def _chunked(x: Tensors) -> Tensors:
    """torch's own way to do without the logits, from 2.13 on."""
    options = torch.nn.LinearCrossEntropyOptions()
    return {"output": F.linear_cross_entropy(x["input"], x["weight"], x["target"], options=options)}


def _providers(case: LinearCrossEntropyCase, settings: Settings) -> dict[str, Provider]:
    found: dict[str, Provider] = {"torchweld": case.ours, "torch": case.torch}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["torch:chunked"] = _chunked
    if settings.compile:
        found["torch.compile"] = compiled(case.torch)
    return found


def _check(case: LinearCrossEntropyCase, dtype: torch.dtype, settings: Settings) -> dict[str, float]:
    few = replace(case, rows=(min(_CHECKED_ROWS, case.rows[0]),))
    with backend.strict():
        few.ours(few.inputs(dtype, settings.device))
    oracle = Oracle(few, dtype, settings.device)
    confirm(oracle.judge(), few.op, few.name)
    providers = {"torchweld": few.ours, "torch": few.torch}
    return {n: max(v.error for v in oracle.judge(p, poison=n == "torchweld")) for n, p in providers.items()}


def step(provider: Provider, x: Tensors) -> Any:
    """Loss and gradients of input and weight."""
    leaves = {n: x[n].requires_grad_() for n in ("input", "weight")}
    return torch.autograd.grad(provider({**x, **leaves})["output"], list(leaves.values()))


def _forward(provider: Provider, x: Tensors) -> Any:
    with torch.no_grad():
        return provider(x)


def _calls(case: LinearCrossEntropyCase, dtype: torch.dtype, settings: Settings, direction: str) -> dict[str, Call]:
    x = case.inputs(dtype, settings.device)
    call = step if direction == "step" else _forward
    return {name: partial(call, provider, x) for name, provider in _providers(case, settings).items()}


def linear_cross_entropy(settings: Settings) -> Iterator[Work]:
    """`step` is forward and backward together: ours makes the gradients in the pass of the forward."""
    case = replace(CASE, rows=(512,) if settings.quick else CASE.rows)
    case = replace(case, name=f"{case.rows[0]} x {case.features} into {case.classes}")
    # Two FLOPs for each row, feature and class forward; twice that backward.
    product = 2.0 * case.rows[0] * case.features * case.classes
    for dtype in settings.dtypes:
        check = cache(partial(_check, case, dtype, settings))
        for direction, products in (("forward", 1), ("step", 3)):
            if direction in settings.directions:
                yield Work(
                    op=case.op,
                    direction=direction,
                    dtype=dtype,
                    case={
                        "name": case.name,
                        "rows": case.rows[0],
                        "features": case.features,
                        "classes": case.classes,
                    },
                    calls=partial(_calls, case, dtype, settings, direction),
                    check=check,
                    flops=products * product,
                )
