"""adamw_: one step of AdamW or Adam as one op over lists of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from torchweld import reference
from torchweld.ops._arguments import flag, integer, number
from torchweld.ops._optimizer import Step, Tensors, as_lists, checked_step, run_step, step_fake, take_step
from torchweld.ops._register import register


class AdamWLists(NamedTuple):
    """The lists of one step, all in the order of the parameters. A list that does not apply is empty."""

    params: Tensors
    grads: Tensors
    exp_avgs: Tensors
    exp_avg_sqs: Tensors
    max_exp_avg_sqs: Tensors
    steps: Tensors
    masters: Tensors


class AdamWOptions(NamedTuple):
    """The numbers of the update rule."""

    beta1: float
    beta2: float
    eps: float
    decoupled: bool


# ---- Implementation


def _definition(*, max_exp_avg_sqs: Sequence[Tensor], **rest: Any) -> Tensor | None:
    return reference.adamw_(max_exp_avg_sqs=max_exp_avg_sqs, amsgrad=len(max_exp_avg_sqs) > 0, **rest)


def _adamw(lists: AdamWLists, options: AdamWOptions, step: Step) -> None:
    run_step("adamw_", lists, options, step, _definition)


_adamw_op = register(
    "adamw_(AdamWLists lists, AdamWOptions options, Step step) -> ()",
    _adamw,
    step_fake,
    AdamWLists,
    AdamWOptions,
    Step,
)

# ---- Public


def adamw_(
    params: Iterable[Tensor],
    grads: Iterable[Tensor],
    exp_avgs: Iterable[Tensor],
    exp_avg_sqs: Iterable[Tensor],
    max_exp_avg_sqs: Iterable[Tensor],
    steps: Iterable[Tensor],
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
    masters: Iterable[Tensor] = (),
    rounding_seed: int | None = None,
    zero_grads: bool = False,
) -> Tensor | None:
    """One step of AdamW (or Adam) over lists of tensors, in place and in one pass over their memory.

    AdamW: Loshchilov, Hutter (arXiv:1711.05101); Adam: Kingma, Ba (arXiv:1412.6980); the maths is in
    `torchweld.reference.adamw_`. Works in float32. Takes no part in autograd: call it under `torch.no_grad()`.

    Args:
        params: tensors of any shapes on one device, float32, bfloat16 or float16 in any mixture. Other dtypes run on
            the reference.
        grads, exp_avgs, exp_avg_sqs: one tensor for each of params, of its shape, in its dtype or float32.
        max_exp_avg_sqs: the same for `amsgrad=True`, else ignored.
        steps: the number of updates so far, one float32 element for each of params, on their device. The step adds 1.
        lr: a number, or a tensor of one element (read on the device, without a host sync).
        decoupled: True for AdamW's weight decay, False for Adam's L2 term.
        max_grad_norm: clip the gradients to this global norm, as `torch.nn.utils.clip_grad_norm_` does before a step,
            but without storing the clipped gradients. None: no clipping.
        grad_norm: the norm that clipping uses, for example of more tensors than `grads`. None: the norm of `grads`.
        grad_scale: one element. The step divides the gradients by it first and stores the quotients, as GradScaler
            needs.
        found_inf: one element. If it is not zero, nothing changes, not even `steps`.
        masters: a float32 copy of each of params. The step updates the masters, and each parameter becomes the rounding
            of its master. Where an element of a parameter is not that rounding, other code has written it; the step
            then starts from the parameter. Empty: the step updates the parameters themselves.
        rounding_seed: seed of a random rounding of bfloat16 parameters, whose mean is the exact value: small updates
            count even without masters. The bits depend only on the seed, the step, the parameter's index in the list
            and the element's index in the parameter. None: round to nearest. Not for float16.
        zero_grads: set the gradients to zero in the same pass.

    Returns:
        The norm before clipping (a float32 scalar) if `max_grad_norm` or `grad_norm` is given, else None.

    Raises:
        ValueError: lists of different lengths; a device, dtype or shape that does not fit, naming the tensor; a
            hyper-parameter out of range. Nothing has been changed then.
        TypeError: an argument that is no list of tensors, a sparse or nested tensor in one; a scalar that is neither a
            number nor a tensor.
        RuntimeError: a tensor requires grad, outside of `torch.no_grad()`.
    """
    op = "adamw_"
    beta1, beta2, eps = number(op, "beta1", beta1), number(op, "beta2", beta2), number(op, "eps", eps)
    for name, value, fits, expected in (
        ("beta1", beta1, 0 <= beta1 < 1, "0 <= beta1 < 1"),
        ("beta2", beta2, 0 <= beta2 < 1, "0 <= beta2 < 1"),
        ("eps", eps, eps >= 0, "eps >= 0"),
    ):
        if not fits:
            raise ValueError(f"[adamw_] {name}: expected {expected}, but got {value}")
    amsgrad, decoupled = flag(op, "amsgrad", amsgrad), flag(op, "decoupled", decoupled)
    if rounding_seed is not None:
        rounding_seed = integer(op, "rounding_seed", rounding_seed, "an integer or None")
    lists = AdamWLists(
        **as_lists(
            op,
            params=params,
            grads=grads,
            exp_avgs=exp_avgs,
            exp_avg_sqs=exp_avg_sqs,
            max_exp_avg_sqs=max_exp_avg_sqs if amsgrad else [],
            steps=steps,
            masters=masters,
        )
    )
    if amsgrad and len(lists.max_exp_avg_sqs) == 0 and len(lists.params) > 0:
        raise ValueError(
            "[adamw_] max_exp_avg_sqs: expected one tensor for each of params (amsgrad=True), but got none"
        )
    step = checked_step(
        op,
        lr=lr,
        weight_decay=weight_decay,
        maximize=maximize,
        max_grad_norm=max_grad_norm,
        grad_norm=grad_norm,
        grad_scale=grad_scale,
        found_inf=found_inf,
        zero_grads=zero_grads,
        rounding_seed=rounding_seed,
    )
    return take_step(op, _adamw_op, _definition, lists, AdamWOptions(beta1, beta2, eps, decoupled), step)
