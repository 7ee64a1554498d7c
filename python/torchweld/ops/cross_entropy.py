"""cross_entropy of class indices, without ever storing the probabilities."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from torchweld import backend, reference
from torchweld.ops._arguments import (
    KERNEL_DTYPES,
    check_dense,
    check_float,
    check_memory,
    defined,
    integer,
    number,
    shown,
)
from torchweld.ops._register import (
    applier,
    compiling,
    differentiate,
    double_backward,
    elsewhere,
    recorder,
    register,
    settle,
    under_autocast,
    wants_definition,
    wants_grad,
)

_twin = torch.nn.functional.cross_entropy
_LOGITS, _TARGET = "[cross_entropy] input", "[cross_entropy] target"

# ---- Implementation. The kernels make the loss of each row, torch reduces it. The bindings check every target.


def _forward(logits: Tensor, target: Tensor, ignore_index: int, smoothing: float) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    loss = logits.new_empty(rows, dtype=torch.float32)
    stats = logits.new_empty((2, rows), dtype=torch.float32)
    backend.kernels[logits.device.type].cross_entropy_forward(
        logits=settle(logits, _LOGITS),
        target=settle(target, _TARGET),
        ignore_index=ignore_index,
        smoothing=smoothing,
        loss=loss,
        stats=stats,
    )
    return loss, stats


def _backward(
    dloss: Tensor, logits: Tensor, target: Tensor, ignore_index: int, smoothing: float, stats: Tensor
) -> Tensor:
    x = settle(logits, _LOGITS)
    dlogits = torch.empty_like(x)
    backend.kernels[x.device.type].cross_entropy_backward(
        dloss=settle(dloss, "[cross_entropy] gradient of the loss"),
        logits=x,
        target=settle(target, _TARGET),
        ignore_index=ignore_index,
        smoothing=smoothing,
        stats=settle(stats, "[cross_entropy] statistics"),
        dlogits=dlogits,
    )
    return dlogits


# ---- Fake


def _forward_fake(logits: Tensor, target: Tensor, ignore_index: int, smoothing: float) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=torch.float32), logits.new_empty((2, rows), dtype=torch.float32)


def _backward_fake(
    dloss: Tensor, logits: Tensor, target: Tensor, ignore_index: int, smoothing: float, stats: Tensor
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


_forward_op = register(
    "cross_entropy_forward(Tensor logits, Tensor target, int ignore_index, float smoothing)"
    " -> (Tensor loss, Tensor stats)",
    _forward,
    _forward_fake,
)
_backward_op = register(
    "cross_entropy_backward(Tensor dloss, Tensor logits, Tensor target, int ignore_index, float smoothing,"
    " Tensor stats) -> Tensor",
    _backward,
    _backward_fake,
)


def row_losses(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The losses of rows that all count, and their statistics (2, N): max and sum(exp(logits - max)). float32."""
    loss, stats = _forward_op(logits, target, -1, 0.0)
    return loss, stats


def row_gradients(dloss: Tensor, logits: Tensor, target: Tensor, stats: Tensor) -> Tensor:
    """The gradient of the logits, by the statistics of whole rows of which `logits` may be a part."""
    dlogits: Tensor = _backward_op(dloss, logits, target, -1, 0.0, stats)
    return dlogits


# ---- Autograd


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        ignore_index: int,
        smoothing: float,
        reduction: str,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.ignore_index, ctx.smoothing, ctx.reduction = ignore_index, smoothing, reduction
        losses, stats = _forward_op(logits, target, ignore_index, smoothing)
        loss, rows = _reduced(losses, target, ignore_index, reduction)
        ctx.rows = None  # a number where the forward was a whole call
        ctx.save_for_backward(logits, target, stats, rows)
        return loss.to(dtype)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return _CrossEntropy.gradients(ctx, ctx.saved_tensors, dloss)

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Any, ...], dloss: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, stats, rows = saved
        ignore_index, smoothing, reduction = ctx.ignore_index, ctx.smoothing, ctx.reduction
        if wants_definition(dloss):

            def function(x: Tensor) -> Tensor:
                return reference.cross_entropy(x.float(), target, None, ignore_index, reduction, smoothing)

            dlogits = double_backward(function, (logits,), (dloss.float(),), (True,))[0]
            return dlogits, None, None, None, None, None
        rows = rows if ctx.rows is None else ctx.rows
        if rows is not None:
            dloss = dloss.double() / rows
        dlogits = _backward_op(dloss.float().expand(target.shape), logits, target, ignore_index, smoothing, stats)
        return dlogits, None, None, None, None, None


_with_grad = applier(_CrossEntropy)


def _losses_and_statistics(
    logits: Tensor, target: Tensor, ignore_index: int, smoothing: float
) -> tuple[Tensor, Tensor]:
    losses = _with_grad(logits, target, ignore_index, smoothing, "none", torch.float32)
    return losses, losses.grad_fn.saved_tensors[2]


differentiate("cross_entropy_forward", _losses_and_statistics)
_node = recorder(_CrossEntropy, "cross_entropy", "ignore_index", "smoothing", "reduction", "rows")
_whole = backend.whole_call("cross_entropy")


def _reduced(losses: Tensor, target: Tensor, ignore_index: int, reduction: str) -> tuple[Tensor, Tensor | None]:
    """The losses by `reduction`; and for "mean" the number of rows that count.

    Summed in float64: the rounding errors of all rows may be equal, and would add up.
    """
    if reduction == "none":
        return losses, None
    total = losses.sum(dtype=torch.float64)
    if reduction == "sum":
        return total, None
    rows = (target != ignore_index).sum()
    return total / rows, rows


# ---- Public


def _deprecated(size_average: bool | None, reduce: bool | None) -> str:
    """The reduction that torch's deprecated arguments name, each True where it is not given."""
    each, total = (value is not None and not value for value in (reduce, size_average))
    reduction = "none" if each else "sum" if total else "mean"
    remedy = f"use reduction={reduction!r}"
    warnings.warn(f"[cross_entropy] size_average, reduce: deprecated in torch; {remedy}", stacklevel=3)
    return reduction


def _refusal(input: Tensor, target: Tensor, weight: Tensor | None) -> str | None:
    """Why the kernels do not take this call; None if they do."""
    if input.dtype not in KERNEL_DTYPES:
        return f"input of dtype {input.dtype}"
    if weight is not None:
        return "class weights"
    if target.dtype.is_floating_point:
        return "class probabilities as target"
    if target.dtype is torch.uint8:
        return "classes of dtype uint8"
    # Where a graph is made, the number of rows may not be known. The kernels take none.
    if input.dim() != 2 or input.shape[1] == 0 or (not torch.compiler.is_compiling() and input.shape[0] == 0):
        return "logits other than a matrix (N, C) with elements"
    return None


def _check(input: Tensor, target: Tensor, weight: Tensor | None) -> None:
    """Raises torch's errors, but for those that depend on values."""
    shape, dtype = input.shape, target.dtype
    if len(shape) == 0:
        raise IndexError("[cross_entropy] input: expected at least one dimension, but got shape []")
    classes, rows = (shape[1], (shape[0], *shape[2:])) if len(shape) > 1 else (shape[0], ())
    if dtype.is_floating_point and target.shape == shape:
        check_float("cross_entropy", "target", dtype)
    elif target.shape != rows and (len(shape) > 1 or target.shape != (1,)):
        other = f" for classes, or {list(shape)} for probabilities" if dtype.is_floating_point else ""
        expected = f"shape {list(rows)}{other}"
        # torch's class of error depends on the number of rows, which is 0 for a target without dimensions.
        count = target.shape[0] if target.dim() > 0 else 0
        other_rows = count != shape[0] if len(shape) > 1 else target.dim() == 1 and count != shape[0]
        raise (ValueError if other_rows else RuntimeError)(
            f"[cross_entropy] target: expected {expected}, but got {list(target.shape)}"
        )
    elif dtype not in (torch.int64, torch.uint8):
        remedy = "convert classes with .long()"
        raise RuntimeError(f"[cross_entropy] target: expected dtype torch.int64, but got {dtype}; {remedy}")
    for name, t in (("target", target), ("weight", weight)):
        if t is not None and t.device != input.device:
            raise RuntimeError(f"[cross_entropy] {name}: expected device {input.device}, but got {t.device}")
    if weight is not None:
        if weight.dim() > 1 or weight.numel() != classes:
            raise RuntimeError(f"[cross_entropy] weight: expected shape [{classes}], but got {list(weight.shape)}")
        check_float("cross_entropy", "weight", weight.dtype)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """-log softmax(input)[target]; drop-in for `torch.nn.functional.cross_entropy`.

    The probabilities are never stored: the logits are read once forward, and once backward to write their gradient.
    So the logits must not be changed in place between the two; autograd raises where they were. (torch keeps the
    log-probabilities, as large as the logits, and allows it.)
    The loss of each row and their mean are float32, rounded to input's dtype at the end (under autocast they are not).
    Class probabilities and weights of another dtype promote the result, as in torch.

    Args:
        input: logits (N, C), float32, bfloat16 or float16 (other shapes and dtypes run on the reference).
        target: classes (N), int64, each in [0, C) or `ignore_index` (uint8 and class probabilities run on the
            reference).
        weight: a weight for each class (C) (runs on the reference).
        size_average, reduce: torch's deprecated arguments. They name a reduction.
        ignore_index: rows with this target have no loss, no gradient, and do not count in the mean.
        reduction: "mean" over the rows that count, "sum", or "none" for all (N).
        label_smoothing: in [0, 1]; see `torchweld.reference.cross_entropy`.

    Raises:
        IndexError: a target is not a class.
        TypeError: input is not floating point of 16 bits or more, or an argument is of another type.
        ValueError, RuntimeError: an argument, shape, dtype or device does not fit.
    """
    if weight is None and size_average is None and reduce is None and not compiling():
        found = _whole(
            input=input, target=target, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
        if found is True:
            dtype = torch.float32 if under_autocast(input) else input.dtype
            return _node(input, target, ignore_index, label_smoothing, reduction, dtype)
        if found is not None:
            wide = input.dtype is torch.float16 and not under_autocast(input)
            return found.to(input.dtype) if wide else found
    if size_average is not None or reduce is not None:
        reduction = _deprecated(size_average, reduce)
    if not isinstance(reduction, str) or reduction not in ("mean", "sum", "none"):
        raise ValueError(f"[cross_entropy] reduction: expected 'mean', 'sum' or 'none', but got {shown(reduction)}")
    label_smoothing = number("cross_entropy", "label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"[cross_entropy] label_smoothing: expected a number in [0, 1], but got {label_smoothing}")
    ignore_index = integer("cross_entropy", "ignore_index", ignore_index)
    if theirs := elsewhere(cross_entropy, _twin, ("input", "target", "weight"), input, target, weight):
        options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
        return theirs(input, target, weight, **options)
    check_dense("cross_entropy", input=input, target=target, **({} if weight is None else {"weight": weight}))
    if input.dtype not in KERNEL_DTYPES:
        check_float("cross_entropy", "input", input.dtype)
    _check(input, target, weight)
    # The kernels read 16 bits without a conversion. Losses are float32 up to the last rounding.
    dtype = input.dtype
    if under_autocast(input) and dtype in KERNEL_DTYPES:
        dtype = torch.float32
    if backend.choose("cross_entropy", input.device, _refusal(input, target, weight)) == "reference":
        tensors = {"input": input, "target": target, "weight": weight}
        check_memory("cross_entropy", input=input)
        rest = (ignore_index, reduction, label_smoothing)
        return defined(reference.cross_entropy, "cross_entropy", tensors, input.to(dtype), target, weight, *rest)
    if wants_grad(input):
        return _with_grad(input, target, ignore_index, label_smoothing, reduction, dtype)
    losses = _forward_op(input, target, ignore_index, label_smoothing)[0]
    return _reduced(losses, target, ignore_index, reduction)[0].to(dtype)
