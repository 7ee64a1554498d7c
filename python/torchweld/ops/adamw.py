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
    """The lists of one step, tensor for tensor; empty where there is nothing of the kind."""

    params: Tensors
    grads: Tensors
    exp_avgs: Tensors
    exp_avg_sqs: Tensors
    max_exp_avg_sqs: Tensors
    steps: Tensors
    masters: Tensors


class AdamWOptions(NamedTuple):
    """The numbers of the rule."""

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
        masters: float32, one for each of params: these are stepped, and the parameters become their roundings. Where an
            element of a parameter is not a rounding of its master's, the step starts from it: somebody else has written
            it. None given: the parameters are stepped.
        rounding_seed: rounds bfloat16 parameters up or down at random, with the exact value as the mean: small updates
            count even without masters. The bits depend on the seed, the step, and the parameter's place in the list and
            the element's in the parameter, and on nothing else. None: to nearest. Not for float16.
        zero_grads: leaves the gradients as zeros, in the same pass.

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
