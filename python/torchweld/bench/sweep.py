"""`torchweld bench sweep`: calls of all sizes that models make, beside torch, to find where torchweld would cost time.

Nothing is checked here (`bench` and `check` do that), and a cell is timed for a twentieth of a measurement's time. A
cell is one op at one size in one dtype: a forward without gradients, a training step (forward and backward), or a step
of an optimizer.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from torchweld import ops, optim
from torchweld.bench.harness import Call, Settings, Work, measure
from torchweld.bench.report import SLOWER, Row, plotter

DARK = 1.3  # the log2 of a ratio whose colour wants white letters
SAMPLE = 1e-3  # seconds of calls in a sample
SHARE = 20  # cells in the time of one measurement of `bench`

ROWS = ((1, 64), (1, 768), (8, 64), (16, 256), (32, 768), (128, 768), (197, 768), (512, 512), (2048, 768), (8192, 1024))
LOGITS = ((8, 10), (64, 2), (32, 1000), (512, 4096), (1024, 50257))
HEADS = (  # batch, heads, queries, keys, head_dim
    *((1, 2, 8, 8, 16), (1, 8, 16, 16, 64), (1, 12, 32, 32, 64), (4, 4, 64, 64, 32), (8, 8, 64, 64, 64)),
    *((64, 4, 49, 49, 32), (1, 8, 77, 77, 64), (1, 12, 128, 128, 64), (1, 12, 197, 197, 64), (2, 8, 256, 256, 64)),
    *((1, 12, 384, 384, 64), (1, 16, 512, 512, 128), (1, 8, 1024, 77, 40), (1, 1, 2048, 2048, 64)),
    *((1, 12, 1, 64, 64), (1, 12, 1, 512, 64), (4, 12, 1, 512, 64), (1, 32, 1, 2048, 128)),
)
LISTS = ((1, 10), (4, 100), (20, 1000), (150, 1000), (150, 60000), (4, 1000000))  # parameters, elements of each

Function = Callable[..., Tensor]


def _shown(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


def _leaves(settings: Settings, dtype: torch.dtype, grad: bool, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(s, dtype=dtype, device=settings.device, requires_grad=grad) for s in shapes]


def _call(function: Function, leaves: list[Tensor], grad: bool) -> Call:
    """The call as a user writes it; with `grad` a step forward and backward."""
    if not grad:
        return lambda: function(*leaves)

    def step() -> None:
        output = function(*leaves)
        torch.autograd.grad(output, leaves, torch.ones_like(output))

    return step


def _pairs(settings: Settings, dtype: torch.dtype, grad: bool) -> Iterator[tuple[str, str, Function, Function, Any]]:
    """Each (op, size, ours, torch's, leaves)."""
    for m, n in ROWS:
        size, shape = _shown((m, n)), (n,)
        leaves = _leaves(settings, dtype, grad, (m, n), shape, shape)
        for name in ("layer_norm", "rms_norm"):
            ours, theirs = getattr(ops, name), getattr(F, name)
            given = leaves if name == "layer_norm" else leaves[:2]
            yield (
                name,
                size,
                lambda x, *ps, f=ours, s=shape: f(x, s, *ps),
                lambda x, *ps, f=theirs, s=shape: f(x, s, *ps),
                given,
            )
        wide = _leaves(settings, dtype, grad, (m, 4 * n))
        for approximate in ("tanh", "none"):
            yield (
                f"gelu {approximate}",
                _shown((m, 4 * n)),
                lambda x, a=approximate: ops.gelu(x, approximate=a),
                lambda x, a=approximate: F.gelu(x, approximate=a),
                wide,
            )
    for m, classes in LOGITS:
        target = torch.randint(classes, (m,), device=settings.device)
        yield (
            "cross_entropy",
            _shown((m, classes)),
            lambda x, t=target: ops.cross_entropy(x, t),
            lambda x, t=target: F.cross_entropy(x, t),
            _leaves(settings, dtype, grad, (m, classes)),
        )
    for b, h, queries, keys, d in HEADS:
        leaves = _leaves(settings, dtype, grad, (b, h, queries, d), (b, h, keys, d), (b, h, keys, d))
        mask = torch.ones(b, 1, 1, keys, dtype=torch.bool, device=settings.device)
        mask[..., keys * 3 // 4 + 1 :] = False
        forms: list[tuple[str, dict[str, Any]]] = [("attention", {}), ("attention, padding mask", {"attn_mask": mask})]
        if queries == keys:
            forms.append(("attention, causal", {"is_causal": True}))
        for name, options in forms:
            yield (
                name,
                _shown((b, h, queries, keys, d)),
                lambda q, k, v, o=options: ops.scaled_dot_product_attention(q, k, v, **o),
                lambda q, k, v, o=options: F.scaled_dot_product_attention(q, k, v, **o),
                leaves,
            )


def _repeats(call: Call) -> int:
    """Calls that fill a sample."""
    call()
    start = time.perf_counter()
    call()
    return max(1, min(200, int(SAMPLE / (time.perf_counter() - start))))


def _work(op: str, direction: str, dtype: torch.dtype, size: str, calls: dict[str, Call]) -> Work:
    return Work(
        op, direction, dtype, {"name": size}, lambda: calls, repeats=_repeats(calls["torchweld"]), wall=True
    )  # fmt: skip


def cells(settings: Settings) -> Iterator[Work]:
    """All cells of the ops, then those of the optimizers beside torch's fused ones."""
    kinds = [grad for grad, name in ((False, "forward"), (True, "backward")) if name in settings.directions]
    for dtype, grad in itertools.product(settings.dtypes, kinds):
        direction = "training" if grad else "forward"
        for op, size, ours, theirs, leaves in _pairs(settings, dtype, grad):
            calls = {"torchweld": _call(ours, leaves, grad), "torch": _call(theirs, leaves, grad)}
            if settings.compile:
                calls["torch.compile"] = _call(torch.compile(theirs, dynamic=False), leaves, grad)
            yield _work(op, direction, dtype, size, calls)
    if "step" not in settings.directions:
        return
    for name, (count, elements) in itertools.product(("AdamW", "SGD"), LISTS):
        steps: dict[str, Call] = {}
        for provider, package in (("torchweld", optim), ("torch", torch.optim)):
            params = [nn.Parameter(p) for p in torch.randn(count, elements, device=settings.device)]
            for p in params:
                p.grad = torch.randn_like(p)
            more = {"fused": True} if package is torch.optim else {}
            steps[provider] = getattr(package, name)(params, lr=1e-3, **more).step
        yield _work(name, "step", torch.float32, _shown((count, elements)), steps)


def sweep(settings: Settings) -> Iterator[list[Row]]:
    """The rows of each cell."""
    quickly = replace(settings, seconds=settings.seconds / SHARE)
    for work in cells(settings):
        yield measure(work, quickly)


def _ratios(rows: Sequence[Row]) -> dict[tuple[str, str, str], dict[str, float]]:
    """The speed as a multiple of torch's by op, direction and dtype, and by size."""
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        if row["provider"] == "torchweld":
            kind = row["op"], row["direction"], row["dtype"]
            found.setdefault(kind, {})[row["case"]["name"]] = row["speedup_vs_torch"]
    return found


def summary(rows: Sequence[Row]) -> Table:
    """A line for each op, direction and dtype: the speed as a multiple of torch's."""
    table = Table("op", "direction", "dtype", "cells", f"below {SLOWER}", "worst", "median", title="x torch")
    for kind, by_size in _ratios(rows).items():
        ratios = list(by_size.values())
        worst = min(by_size, key=lambda size: by_size[size])
        slow = sum(r < SLOWER for r in ratios)
        table.add_row(
            *kind, str(len(ratios)), str(slow), f"{by_size[worst]:.2f} ({worst})", f"{statistics.median(ratios):.2f}"
        )  # fmt: skip
    return table


def heat_map(rows: Sequence[Row], path: Path) -> None:
    """A picture of `summary` by size: blue where torchweld is faster, red where torch is."""
    pyplot = plotter()
    by_op: dict[str, dict[tuple[str, str, str], dict[str, float]]] = {}
    for kind, by_size in _ratios(rows).items():
        by_op.setdefault(kind[0], {})[kind] = by_size
    heights = [len(kinds) + 2 for kinds in by_op.values()]
    figure, axes = pyplot.subplots(
        len(by_op), 1, figsize=(14, 0.45 * sum(heights) + 1), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for ax, (op, kinds) in zip(axes[:, 0], by_op.items(), strict=True):
        sizes = list(dict.fromkeys(size for by_size in kinds.values() for size in by_size))
        grid = torch.tensor([[by_size.get(size, float("nan")) for size in sizes] for by_size in kinds.values()])
        picture = ax.imshow(grid.log2(), cmap="RdBu", vmin=-2, vmax=2, aspect="auto")
        for i, j in itertools.product(range(len(kinds)), range(len(sizes))):
            ratio = float(grid[i, j])
            dark = abs(math.log2(ratio)) > DARK  # False for the NaN of a size that this row has not
            ax.text(j, i, f"{ratio:.2f}", ha="center", va="center", fontsize=7, color="white" if dark else "black")
        ax.set_xticks(range(len(sizes)), sizes, fontsize=7, rotation=20, ha="right")
        ax.set_yticks(range(len(kinds)), [f"{direction} {dtype}" for _, direction, dtype in kinds], fontsize=7)
        ax.set_title(op, fontsize=9)
    bar = figure.colorbar(picture, ax=axes[:, 0], shrink=0.3, label="speed as a multiple of torch's")
    bar.set_ticks(range(-2, 3), labels=["1/4", "1/2", "1", "2", "4"])
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
