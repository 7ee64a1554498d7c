"""Losses of DTensors: cut along rows, and along the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchweld.distributed.layouts import Labels, Layout, Rule, distributed, layout_of
from torchweld.distributed.vocabulary import Vocabulary, losses_of
from torchweld.ops._arguments import KERNEL_DTYPES
from torchweld.ops._register import under_autocast

_CLASSES = "classes"


def _finish(layout: Layout, total: Tensor, count: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The sum, or the mean over all that count, of all parts' losses."""
    loss = layout.total(total)
    return (loss if count is None else loss / layout.total(count)).to(dtype)


def _rows(layout: Layout) -> Layout:
    """The layout of what has a value for each row."""
    return Layout(layout.mesh, tuple(None if cut == _CLASSES else cut for cut in layout.cuts), layout.sizes)


def _layout(
    op: str, mesh: Any, found: dict[str, DTensor], rule: Callable[[str | None], Rule], by_class: bool
) -> tuple[Layout, Rule]:
    """The layout; classes may be cut if `by_class`, and are then cut on one dimension of the mesh."""
    own = rule(_CLASSES if by_class else None)
    layout = layout_of(mesh, found, own)
    if layout.cuts.count(_CLASSES) > 1:
        own = rule(None)
        layout = layout_of(mesh, found, own)
    return layout, own


def _result(x: Tensor) -> torch.dtype:
    """Of a loss: under autocast it is not rounded to the dtype of the logits or features."""
    return torch.float32 if under_autocast(x) and x.dtype in KERNEL_DTYPES else x.dtype


def _reduce(
    layout: Layout,
    losses: Tensor,
    target: Tensor,
    ignore_index: int,
    reduction: str,
    labels: Labels,
    dtype: torch.dtype,
) -> Tensor:
    """Of the losses of rows, float32, with zero where the target is `ignore_index`."""
    rows = _rows(layout)
    if reduction == "none":
        return rows.whole(losses.to(dtype), labels)
    count = (target != ignore_index).sum() if reduction == "mean" else None
    return _finish(rows, losses.sum(dtype=torch.float64), count, dtype)


def cross_entropy(function: Callable[..., Any], given: dict[str, Any], names: tuple[str, ...]) -> Tensor:
    """Cut along the rows; along the classes where there are classes as targets, without weights and smoothing."""
    op, reduction = "cross_entropy", given.get("reduction", "mean")
    ignore_index, smoothing = given.get("ignore_index", -100), given.get("label_smoothing", 0.0)
    mesh, found = distributed(op, {name: given.get(name) for name in names})
    x, target, weight = found["input"], found["target"], found.get("weight")
    chances = target.dtype.is_floating_point
    dims = x.dim()
    rows: Labels = ("rows", *(f"dimension {d}" for d in range(2, dims))) if dims > 1 else ()

    def rule(classes: str | None) -> Rule:
        logits: Labels = (rows[0], classes, *rows[1:]) if dims > 1 else (classes,)
        return Rule({"input": logits, "target": logits if chances else rows, "weight": (None,)}, (rows,))

    by_class = weight is None and smoothing == 0 and not chances and dims == 2
    layout, own = _layout(op, mesh, found, rule, by_class)
    parts = {name: layout.local(t, own.inputs[name]) for name, t in found.items()}
    logits, classes = parts["input"], parts["target"]
    dtype = _result(x)
    if _CLASSES in layout.cuts:
        vocabulary = Vocabulary.of(layout, _CLASSES, x.shape[1])
        losses, _ = losses_of(logits, classes, ignore_index, vocabulary)
        return _reduce(layout, losses, classes, ignore_index, reduction, rows, dtype)
    options = {"ignore_index": ignore_index, "label_smoothing": smoothing}
    if reduction == "none":
        return layout.whole(function(logits, classes, parts.get("weight"), reduction="none", **options), rows)
    # The sum of the parts is rounded once, at the end.
    with torch.autocast(logits.device.type, dtype=torch.bfloat16, cache_enabled=False):
        total = function(logits, classes, parts.get("weight"), reduction="sum", **options)
    count: Tensor | None = None
    if reduction == "mean" and chances:
        count = logits.new_full((), logits.numel() // logits.shape[1 if dims > 1 else 0], dtype=torch.int64)
    elif reduction == "mean":
        counted = classes != ignore_index
        own_weight = parts.get("weight")
        count = counted.sum()
        if own_weight is not None:
            count = (own_weight[classes.masked_fill(~counted, 0)] * counted).sum()
    return _finish(layout, total, count, dtype)


def linear_cross_entropy(function: Callable[..., Any], given: dict[str, Any], names: tuple[str, ...]) -> Tensor:
    """Cut along the rows; along the classes (a weight sharded along its rows) where there is no smoothing.

    Cut along the classes, each process has the logits of its classes in memory.
    """
    op, reduction = "linear_cross_entropy", given.pop("reduction", "mean")
    ignore_index, smoothing = given.get("ignore_index", -100), given.get("label_smoothing", 0.0)
    mesh, found = distributed(op, {name: given.pop(name, None) for name in names})
    x = found["input"]
    shift = given.pop("shift", False)
    rows: Labels = tuple(f"dimension {d}" for d in range(x.dim() - 1))
    if shift and rows:  # the target of a position is that of the next one
        rows = (*rows[:-1], None)

    def rule(classes: str | None) -> Rule:
        return Rule({"input": (*rows, None), "weight": (classes, None), "target": rows, "bias": (classes,)}, (rows,))

    # A weight that is cut stays so: the rows of the input, which are fewer bytes, are gathered.
    ordered = {name: found[name] for name in ("weight", *names) if name in found}
    layout, own = _layout(op, mesh, ordered, rule, smoothing == 0)
    parts = {name: layout.local(t, own.inputs[name]) for name, t in found.items()}
    dtype, classes = _result(x), parts["target"]
    if shift:
        classes = F.pad(classes[..., 1:], (0, 1), value=ignore_index)
    if _CLASSES in layout.cuts:
        vocabulary = Vocabulary.of(layout, _CLASSES, found["weight"].shape[0])
        logits = F.linear(parts["input"], parts["weight"], parts.get("bias")).flatten(0, -2)
        if softcap := given.get("softcap"):
            logits = softcap * torch.tanh(logits / softcap)
        losses, lse = losses_of(logits, classes.flatten(), ignore_index, vocabulary)
        if z_loss := given.get("z_loss"):
            losses = losses + z_loss * (lse * lse).masked_fill(classes.flatten() == ignore_index, 0.0)
        losses = losses.view(classes.shape)
    else:
        losses = function(parts["input"], parts["weight"], classes, parts.get("bias"), reduction="none", **given)
    found_loss = _reduce(layout, losses, classes, ignore_index, reduction, rows, dtype)
    return found_loss[..., :-1] if shift and reduction == "none" else found_loss
