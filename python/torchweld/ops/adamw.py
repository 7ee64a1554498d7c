"""adamw_ and grad_norm: the whole optimizer step, and the norm it clips by, each as one op over lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from torchweld import backend, reference
from torchweld.ops.library import register

# ---- Implementation. The bindings check everything before they touch memory, and name what the kernels do not take:
# those tensors go to the reference, the others to the kernels.


def _workspace(module: ModuleType, count: int, device: torch.device) -> Tensor | None:
    """Room for the kernels' table of `count` tensors; None where they read it as it was made."""
    words = module.ADAMW_TABLE_WORDS * count
    return torch.empty(words, dtype=torch.int64, device=device) if words else None


def _scalar(t: Tensor | None, device: torch.device) -> Tensor | None:
    return None if t is None else t.to(device, torch.float32, non_blocking=True)


def _culprit(op: str, lists: dict[str, Sequence[object]], device: torch.device) -> ValueError | None:
    """The error for the first element that cannot cross to the kernels at all; sought only after that has failed."""
    for name, each in lists.items():
        for i, t in enumerate(each):
            expected = got = None
            if not isinstance(t, Tensor):
                expected, got = "a torch.Tensor", type(t).__name__
            elif t.layout != torch.strided:
                expected, got = "a dense tensor", f"layout {t.layout}; call .to_dense()"
            elif t.device != device:
                expected, got = f"a tensor on {device}", f"{t.device}; move it with .to()"
            if expected:
                return ValueError(f"[{op}] {name}[{i}]: expected {expected}, but got {got}")
    return None


def _grad_norm(grads: Sequence[Tensor], grad_scale: Tensor | None) -> Tensor:
    device = grads[0].device
    module = backend.module(device)
    norm = torch.empty((), dtype=torch.float32, device=device)
    partial = torch.empty(module.GRAD_NORM_BLOCKS, dtype=torch.float64, device=device)
    table = _workspace(module, len(grads), device)
    try:
        refused = module.grad_norm(grads, _scalar(grad_scale, device), partial, norm, table)
    except (RuntimeError, TypeError) as error:
        raise _culprit("grad_norm", {"grads": grads}, device) or error from None
    if not refused:
        return norm
    for _, reason in refused:
        backend.choose("grad_norm", device, reason)
    return reference.grad_norm(grads, grad_scale=grad_scale).to(torch.float32)


def _adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: float,
    lr_tensor: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    max_grad_norm: float,
    grad_norm: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    device = params[0].device
    module = backend.module(device)
    if lr_tensor is not None and lr_tensor.is_cpu:
        lr, lr_tensor = lr_tensor.item(), None
    lists: list[Sequence[Tensor]] = [params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps]
    on_device = [_scalar(t, device) for t in (lr_tensor, grad_norm, grad_scale, found_inf)]

    def run(lists: list[Sequence[Tensor]]) -> list[tuple[int, str]]:
        return module.adamw_(
            *lists,
            lr,
            on_device[0],
            beta1,
            beta2,
            eps,
            weight_decay,
            decoupled,
            maximize,
            max_grad_norm,
            *on_device[1:],
            _workspace(module, len(lists[0]), device),
        )

    try:
        refused = run(lists)
    except (RuntimeError, TypeError) as error:
        names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps")
        raise _culprit("adamw_", dict(zip(names, lists, strict=True)), device) or error from None
    if refused:
        for _, reason in refused:
            backend.choose("adamw_", device, reason)
        rest = {index for index, _ in refused}
        run([[t for i, t in enumerate(each) if i not in rest] for each in lists])
        reference.adamw_(
            *([t for i, t in enumerate(each) if i in rest] for each in lists),
            lr=lr if lr_tensor is None else lr_tensor,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            decoupled=decoupled,
            amsgrad=len(max_exp_avg_sqs) > 0,
            maximize=maximize,
            max_grad_norm=None if grad_norm is None else max_grad_norm,
            grad_norm=grad_norm,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )
    # An op that is defined by Library.define does not count its mutations for autograd by itself.
    mutated = [*params, *exp_avgs, *exp_avg_sqs, *max_exp_avg_sqs, *steps]
    torch.autograd.graph.increment_version(mutated if grad_scale is None else [*mutated, *grads])


# ---- Fake


def _grad_norm_fake(grads: Sequence[Tensor], grad_scale: Tensor | None) -> Tensor:
    return grads[0].new_empty((), dtype=torch.float32)


def _adamw_fake(*args: object) -> None:
    return None


_grad_norm_op = register("grad_norm(Tensor[] grads, Tensor? grad_scale) -> Tensor", _grad_norm, _grad_norm_fake)
_adamw_op = register(
    "adamw_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs,"
    " Tensor(e!)[] max_exp_avg_sqs, Tensor(f!)[] steps, float lr, Tensor? lr_tensor, float beta1, float beta2,"
    " float eps, float weight_decay, bool decoupled, bool maximize, float max_grad_norm, Tensor? grad_norm,"
    " Tensor? grad_scale, Tensor? found_inf) -> ()",
    _adamw,
    _adamw_fake,
)

# ---- Public


def grad_norm(grads: Sequence[Tensor], *, grad_scale: Tensor | None = None) -> Tensor:
    """Global norm of a list of gradients, divided by |grad_scale|: a float32 scalar on their device, with no host sync.

    What `torch.nn.utils.get_total_norm` gives, but summed in float32 and float64 whatever the dtype, in a fixed order.

    Args:
        grads: at least one tensor, float32, bfloat16 or float16 (others run on the reference), all on one device.
        grad_scale: one element, or None for 1.

    Raises:
        ValueError: the list is empty; a tensor is on another device or not floating point.
    """
    if len(grads) == 0:
        raise ValueError("[grad_norm] grads: expected at least one tensor, but got an empty list")
    if backend.choose("grad_norm", grads[0].device, None) == "reference":
        return reference.grad_norm(grads, grad_scale=grad_scale).to(torch.float32)
    return _grad_norm_op(grads, grad_scale)


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool = True,
    amsgrad: bool = False,
    maximize: bool = False,
    max_grad_norm: float | None = None,
    grad_norm: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Tensor | None:
    """One step of AdamW (or Adam) over lists of tensors, in place and in one pass over their memory.

    AdamW: Loshchilov, Hutter (arXiv:1711.05101); Adam: Kingma, Ba (arXiv:1412.6980); the maths is in
    `torchweld.reference.adamw_`. Works in float32. Takes no part in autograd: call it under `torch.no_grad()`.

    Args:
        params: of any shapes, on one device; float32, bfloat16 or float16 (others run on the reference), mixed at will.
        grads, exp_avgs, exp_avg_sqs: as params, tensor for tensor: same shape; dtype of the parameter, or float32.
        max_exp_avg_sqs: likewise for `amsgrad=True`, else ignored.
        steps: one float32 element each, on params' device: the number of updates so far. Counted up here.
        lr: a number, or a tensor of one element (read on the device, without a host sync).
        decoupled: True for AdamW's weight decay, False for Adam's L2 term.
        max_grad_norm: clip the gradients to this global norm, as `torch.nn.utils.clip_grad_norm_` does before a step,
            but without storing the clipped gradients. None: no clipping.
        grad_norm: the norm to clip by, where it is that of more than `grads`; None: the norm of `grads`.
        grad_scale: one element that the gradients are divided by first; they are stored so, as GradScaler wants it.
        found_inf: one element; where it is not zero nothing moves, not even the steps.

    Returns:
        The norm before clipping (a float32 scalar) if `max_grad_norm` or `grad_norm` is given, else None.

    Raises:
        ValueError: lists of different lengths; a device, dtype or shape that does not fit, naming the tensor; a
            hyper-parameter out of range. Nothing has been changed then.
    """
    for name, value, fits, expected in (
        ("beta1", beta1, 0 <= beta1 < 1, "0 <= beta1 < 1"),
        ("beta2", beta2, 0 <= beta2 < 1, "0 <= beta2 < 1"),
        ("eps", eps, eps >= 0, "eps >= 0"),
        ("max_grad_norm", max_grad_norm, max_grad_norm is None or max_grad_norm > 0, "max_grad_norm > 0, or None"),
    ):
        if not fits:
            raise ValueError(f"[adamw_] {name}: expected {expected}, but got {value}")
    if len(params) == 0:
        return grad_norm
    if not amsgrad:
        max_exp_avg_sqs = []
    elif len(max_exp_avg_sqs) == 0:
        raise ValueError(
            "[adamw_] max_exp_avg_sqs: expected one tensor for each of params (amsgrad=True), but got none"
        )
    if backend.choose("adamw_", params[0].device, None) == "reference":
        norm = reference.adamw_(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs,
            steps,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            decoupled=decoupled,
            amsgrad=amsgrad,
            maximize=maximize,
            max_grad_norm=max_grad_norm,
            grad_norm=grad_norm,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )
        return None if norm is None else norm.to(torch.float32)
    if max_grad_norm is not None and grad_norm is None:
        grad_norm = _grad_norm_op(grads, grad_scale)
    _adamw_op(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        steps,
        0.0 if isinstance(lr, Tensor) else lr,
        lr if isinstance(lr, Tensor) else None,
        beta1,
        beta2,
        eps,
        weight_decay,
        decoupled,
        maximize,
        0.0 if max_grad_norm is None else max_grad_norm,
        None if max_grad_norm is None else grad_norm,
        grad_scale,
        found_inf,
    )
    return grad_norm
