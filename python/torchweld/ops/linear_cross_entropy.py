"""linear_cross_entropy: the loss of a language model's head, without ever having all of its logits in memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torchweld import backend, reference
from torchweld.ops._arguments import (
    KERNEL_DTYPES,
    check_dense,
    check_float,
    check_memory,
    defined,
    flag,
    integer,
    number,
    shown,
)
from torchweld.ops._linear_cross_entropy import NOTHING, LossOptions, Wanted, op
from torchweld.ops._linear_cross_entropy_autograd import loss_of_rows, reduced
from torchweld.ops._register import elsewhere, under_autocast, wants_grad

_OP = "linear_cross_entropy"


def _refusal(input: Tensor, dtype: torch.dtype) -> str | None:
    """Why the kernels do not take this call; None if they do."""
    if dtype not in KERNEL_DTYPES:
        return f"tensors of dtype {dtype}"
    # Where a graph is made, the number of rows may not be known. The op takes none.
    empty = input.shape[-1] == 0 or (not torch.compiler.is_compiling() and input.numel() == 0)
    return "an input without elements" if empty else None


def _check(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, shift: bool) -> None:
    """Raises for what does not fit, as far as it shows without a look at the values."""

    def fail(kind: type[Exception], name: str, expected: str, got: object) -> None:
        raise kind(f"[{_OP}] {name}: expected {expected}, but got {got}")

    shape, dtype = list(input.shape), target.dtype
    if weight.dim() != 2 or weight.shape[0] == 0:
        fail(RuntimeError, "weight", "shape [classes, features] with a class", list(weight.shape))
    if not shape or shape[-1] != weight.shape[1]:
        fail(RuntimeError, "input", f"shape [..., {weight.shape[1]}], as weight has it", shape)
    if bias is not None and bias.shape != weight.shape[:1]:
        fail(RuntimeError, "bias", f"shape {list(weight.shape[:1])}", list(bias.shape))
    if shift and len(shape) < 2:
        fail(RuntimeError, "input", "shape [..., positions, features] with shift=True", shape)
    if dtype.is_floating_point:
        remedy = "class probabilities are for cross_entropy(linear(input, weight, bias), target)"
        fail(RuntimeError, "target", "classes of dtype torch.int64", f"{dtype}; {remedy}")
    if dtype != torch.int64:
        fail(RuntimeError, "target", "dtype torch.int64", f"{dtype}; convert classes with .long()")
    if list(target.shape) != shape[:-1]:
        fail(ValueError, "target", f"shape {shape[:-1]}", list(target.shape))
    for name, t in (("weight", weight), ("target", target), ("bias", bias)):
        if t is not None and t.device != input.device:
            fail(RuntimeError, name, f"device {input.device}", f"{t.device}; move it with .to()")


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    z_loss: float = 0.0,
    shift: bool = False,
) -> Tensor:
    """cross_entropy(linear(input, weight, bias), target) without the logits in memory.

    A chunk of rows at a time is multiplied, turned into losses, and forgotten. Where a gradient is wanted, those of
    input, weight and bias are made in the same pass: a training step makes three products, as without it, and holds the
    logits of one chunk. With reduction="none" the gradients of the losses are unknown until the backward, which then
    makes the logits again.

    `torch.nn.functional.linear_cross_entropy` (torch 2.13) has the same first three arguments; `bias` is its
    `linear_bias`. It has class weights and class probabilities, which this function has not, and no softcap, z_loss and
    shift.

    Args:
        input: (*, H), float32, bfloat16 or float16 (other dtypes run on the reference).
        weight: (V, H), a row for each class. Of tensors of different dtypes all are promoted first.
        target: classes (*), int64, each in [0, V) or `ignore_index`.
        bias: (V).
        ignore_index: rows with this target count nowhere; what they hold is not read, and costs no time.
        label_smoothing: in [0, 1]; see `torchweld.reference.cross_entropy`.
        reduction: "mean" over the rows that count, "sum", or "none" for all (*).
        softcap: c > 0 turns logits into c * tanh(logits / c), as in Gemma 2.
        z_loss: z >= 0 adds z * log(sum(exp(logits)))^2 to the loss of each row, as in PaLM.
        shift: the target of position t of input (*, T, H) is that of position t + 1 of target (*, T), as in a causal
            language model that is given its own tokens. The last position has none; with "none" the result is
            (*, T - 1).

    Returns:
        The loss, float32 inside and rounded to the dtype of the inputs at the end (under autocast it is not).

    Raises:
        IndexError: a target that is no class. On a GPU an assertion ends the kernel: the host does not know the values.
        TypeError: a tensor is not floating point of 16 bits or more, or an argument is of another type.
        ValueError, RuntimeError: an argument, shape, dtype or device that does not fit.
    """
    if not isinstance(reduction, str) or reduction not in ("mean", "sum", "none"):
        raise ValueError(f"[{_OP}] reduction: expected 'mean', 'sum' or 'none', but got {shown(reduction)}")
    ignore_index, shift = integer(_OP, "ignore_index", ignore_index), flag(_OP, "shift", shift)
    label_smoothing, z_loss = number(_OP, "label_smoothing", label_smoothing), number(_OP, "z_loss", z_loss)
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"[{_OP}] label_smoothing: expected a number in [0, 1], but got {label_smoothing}")
    if not 0.0 <= z_loss < float("inf"):
        raise ValueError(f"[{_OP}] z_loss: expected a finite number of at least 0, but got {z_loss}")
    if softcap is not None:
        softcap = number(_OP, "softcap", softcap, "a number or None")
        if not 0.0 < softcap < float("inf"):
            raise ValueError(f"[{_OP}] softcap: expected a finite number above 0, or None, but got {softcap}")
    tensors = {"input": input, "weight": weight, "target": target, "bias": bias}
    options = {
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "reduction": reduction,
        "softcap": softcap,
        "z_loss": z_loss,
        "shift": shift,
    }
    if theirs := elsewhere(linear_cross_entropy, None, tuple(tensors), *tensors.values()):
        return theirs(input, weight, target, bias, **options)
    check_dense(_OP, **{name: t for name, t in tensors.items() if t is not None or name != "bias"})
    dtype = None
    for name in ("input", "weight", "bias"):
        if (t := tensors[name]) is not None:
            check_float(_OP, name, t.dtype)
            dtype = t.dtype if dtype is None else torch.promote_types(dtype, t.dtype)
    assert dtype is not None
    _check(input, weight, target, bias, shift)
    check_memory(_OP, **tensors)
    result = dtype
    if under_autocast(input) and dtype in KERNEL_DTYPES:
        # As autocast has it: the product in its dtype, the loss in float32.
        result, dtype = torch.float32, torch.get_autocast_dtype(input.device.type)
    if backend.choose(_OP, input.device, _refusal(input, dtype)) == "reference":
        x, w, b = (t if t is None else t.to(dtype) for t in (input, weight, bias))
        return defined(reference.linear_cross_entropy, _OP, tensors, x, w, target, b, **options).to(result)
    if shift:  # only the targets are moved: the last positions have none
        target = F.pad(target[..., 1:], (0, 1), value=ignore_index)
    rows, classes = input.to(dtype).reshape(-1, input.shape[-1]), target.reshape(-1)
    w, settings = weight.to(dtype), LossOptions(ignore_index, label_smoothing, softcap or 0.0, z_loss)
    if wants_grad(input, weight, bias):
        wanted = Wanted(*(t is not None and t.requires_grad for t in (input, weight, bias)))
        losses = loss_of_rows(rows, w, bias, classes, settings, reduction, wanted)
    else:
        losses = op(rows, w, bias, classes, settings, None, NOTHING)[0]
        losses = reduced(losses, classes, ignore_index, reduction)
    if reduction == "none":
        losses = losses.reshape(target.shape)
        losses = losses[..., :-1] if shift else losses
    return losses.to(result)
