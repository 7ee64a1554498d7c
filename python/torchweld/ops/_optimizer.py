"""What the optimizers' ops share: grad_norm, the record of a step, and the choice of kernel or reference by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from torchweld import backend, reference
from torchweld.ops._arguments import check_dense, check_memory, defined, flag, number
from torchweld.ops._register import register

Tensors = Sequence[Tensor]
Lists = dict[str, Tensors]

# ---- Implementation. The bindings check all tensors before they touch memory, and return those that the kernels do not
# take. The reference serves these tensors, the kernels the others.


def _workspace(module: backend.Kernels, count: int, device: torch.device) -> Tensor | None:
    """Memory for the kernels' table of `count` tensors on the device; None where they need no copy of it."""
    words = module.OPTIMIZER_TABLE_WORDS * count
    return torch.empty(words, dtype=torch.int64, device=device) if words else None


def _scalar(op: str, name: str, t: Tensor | None, device: torch.device) -> Tensor | None:
    if t is None or (t.dtype is torch.float32 and t.device == device):
        return t
    check_memory(op, **{name: t})
    return t.to(device, torch.float32, non_blocking=True)


def _grad_norm(grads: list[Tensor] | tuple[Tensor, ...], grad_scale: Tensor | None) -> Tensor:
    device = grads[0].device
    module = backend.module(device)
    norm = torch.empty((), dtype=torch.float32, device=device)
    partial = torch.empty(module.GRAD_NORM_BLOCKS, dtype=torch.float64, device=device)
    table = _workspace(module, len(grads), device)
    scale = _scalar("grad_norm", "grad_scale", grad_scale, device)
    refused = module.grad_norm(grads=grads, grad_scale=scale, partial=partial, norm=norm, table=table)
    if not refused:
        return norm
    for _, reason in refused:
        backend.choose("grad_norm", device, reason)
    return reference.grad_norm(grads, grad_scale=grad_scale).to(torch.float32)


class Step(NamedTuple):
    """The arguments that all steps share."""

    lr: float  # 0 beside an lr_tensor
    lr_tensor: Tensor | None
    weight_decay: float
    maximize: bool
    max_grad_norm: float  # 0: no clipping
    grad_norm: Tensor | None
    grad_scale: Tensor | None
    found_inf: Tensor | None
    zero_grads: bool
    rounding_seed: int | None

    def of_definition(self) -> dict[str, Any]:
        """The fields as arguments of a reference."""
        named = self._asdict()
        lr_tensor = named.pop("lr_tensor")
        named["lr"] = self.lr if lr_tensor is None else lr_tensor
        named["max_grad_norm"] = self.max_grad_norm or None
        if self.rounding_seed is None:  # an argument of AdamW alone
            del named["rounding_seed"]
        return named


def run_step(op: str, lists: Any, options: Any, step: Step, definition: Callable[..., Any]) -> None:
    """One step by the kernels, and by `definition` for the tensors that they do not take."""
    device = lists.params[0].device
    module = backend.module(device)
    if step.lr_tensor is not None and step.lr_tensor.is_cpu:
        check_memory(op, lr=step.lr_tensor)
        step = step._replace(lr=step.lr_tensor.item(), lr_tensor=None)
    here = step._replace(
        lr_tensor=_scalar(op, "lr", step.lr_tensor, device),
        grad_norm=_scalar(op, "grad_norm", step.grad_norm, device),
        grad_scale=_scalar(op, "grad_scale", step.grad_scale, device),
        found_inf=_scalar(op, "found_inf", step.found_inf, device),
    )

    def run(lists: Any) -> list[tuple[int, str]]:
        table = _workspace(module, len(lists.params), device)
        return getattr(module, op)(lists=lists, options=options, step=here, table=table)

    refused = run(lists)
    if refused:
        for _, reason in refused:
            backend.choose(op, device, reason)
        rest = {index for index, _ in refused}
        run(type(lists)(*([t for i, t in enumerate(each) if i not in rest] for each in lists)))
        slow = type(lists)(*([t for i, t in enumerate(each) if i in rest] for each in lists))
        definition(**slow._asdict(), **options._asdict(), **step.of_definition())
    # An op that is defined by Library.define does not count its mutations for autograd by itself.
    stored = step.zero_grads or step.grad_scale is not None
    mutated = [t for name, each in lists._asdict().items() if stored or name != "grads" for t in each]
    torch.autograd.graph.increment_version(mutated)


# ---- Fake


def _grad_norm_fake(grads: Sequence[Tensor], grad_scale: Tensor | None) -> Tensor:
    return grads[0].new_empty((), dtype=torch.float32)


def step_fake(*args: object) -> None:
    """The fake of every step, which returns nothing."""
    return None


_grad_norm_op = register("grad_norm(Tensor[] grads, Tensor? grad_scale) -> Tensor", _grad_norm, _grad_norm_fake)

# ---- Public


def grad_norm(grads: Iterable[Tensor], *, grad_scale: Tensor | None = None) -> Tensor:
    """Global norm of a list of gradients, divided by |grad_scale|: a float32 scalar on their device, with no host sync.

    What `torch.nn.utils.get_total_norm` gives, but summed in float32 and float64 whatever the dtype, in a fixed order.

    Args:
        grads: at least one tensor, float32, bfloat16 or float16 (others run on the reference), all on one device.
        grad_scale: one element, or None for 1.

    Raises:
        ValueError: the list is empty; a tensor is on another device or not floating point.
        TypeError: `grads` is no list of tensors, or `grad_scale` no tensor.
    """
    grads = as_lists("grad_norm", grads=grads)["grads"]
    if grad_scale is not None:
        _check_scalar("grad_norm", "grad_scale", grad_scale)
    if len(grads) == 0:
        raise ValueError("[grad_norm] grads: expected at least one tensor, but got an empty list")
    if backend.choose("grad_norm", grads[0].device, None) == "reference":
        tensors = {"grads": grads, "grad_scale": grad_scale}
        return defined(reference.grad_norm, "grad_norm", tensors, grads, grad_scale=grad_scale).to(torch.float32)
    return _grad_norm_op(grads, grad_scale)


def as_lists(op: str, **lists: Iterable[Tensor]) -> Lists:
    """Each argument as a list or tuple of tensors, for an iterator gives its tensors only once."""
    for name, each in lists.items():
        found = each if type(each) is list or type(each) is tuple else _listed(op, name, each)
        if len(found) > 0 and not isinstance(found[0], Tensor):  # the bindings check the others
            raise TypeError(f"[{op}] {name}[0]: expected a torch.Tensor, but got {type(found[0]).__name__}")
        lists[name] = found
    return cast(Lists, lists)


def _listed(op: str, name: str, each: Iterable[Tensor]) -> list[Tensor]:
    if isinstance(each, (Tensor, str, bytes)) or not isinstance(each, Iterable):
        raise TypeError(f"[{op}] {name}: expected a list of tensors, but got {type(each).__name__}")
    return list(each)


def _check_autograd(op: str, lists: Lists) -> None:
    for name, each in lists.items():
        for i, t in enumerate(each):
            if isinstance(t, Tensor) and t.requires_grad:
                kind = "a leaf Variable that requires grad" if t.is_leaf else "a tensor that requires grad"
                remedy = f"call {op} under torch.no_grad()"
                raise RuntimeError(f"[{op}] {name}[{i}]: {kind} is being used in an in-place operation; {remedy}")


def _check_scalar(op: str, name: str, t: Any) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"[{op}] {name}: expected a torch.Tensor of one element, but got {type(t).__name__}")
    check_dense(op, **{name: t})
    if t.numel() != 1:
        raise ValueError(f"[{op}] {name}: expected one element, but got shape {list(t.shape)}")


def checked_step(
    op: str,
    *,
    lr: float | Tensor,
    weight_decay: float,
    maximize: bool,
    max_grad_norm: float | None,
    grad_norm: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    zero_grads: bool,
    rounding_seed: int | None = None,
) -> Step:
    """Checks the arguments that all public steps share, and makes their record."""
    weight_decay = number(op, "weight_decay", weight_decay)
    maximize, zero_grads = flag(op, "maximize", maximize), flag(op, "zero_grads", zero_grads)
    if max_grad_norm is not None:
        max_grad_norm = number(op, "max_grad_norm", max_grad_norm, "a number or None")
        if not max_grad_norm > 0:
            raise ValueError(f"[{op}] max_grad_norm: expected max_grad_norm > 0, or None, but got {max_grad_norm}")
    for name, t in (("grad_norm", grad_norm), ("grad_scale", grad_scale), ("found_inf", found_inf)):
        if t is not None:
            _check_scalar(op, name, t)
    if isinstance(lr, Tensor):
        _check_scalar(op, "lr", lr)
        value, lr_tensor = 0.0, lr
    else:
        value, lr_tensor = number(op, "lr", lr, "a number or a torch.Tensor of one element"), None
    return Step(
        lr=value,
        lr_tensor=lr_tensor,
        weight_decay=weight_decay,
        maximize=maximize,
        max_grad_norm=max_grad_norm or 0.0,
        grad_norm=grad_norm,
        grad_scale=grad_scale,
        found_inf=found_inf,
        zero_grads=zero_grads,
        rounding_seed=rounding_seed,
    )


def take_step(
    op: str,
    call: Callable[..., None],
    definition: Callable[..., Tensor | None],
    lists: Any,
    options: Any,
    step: Step,
) -> Tensor | None:
    """One step of checked arguments, by the kernels or the reference. Computes the norm first where it is needed."""
    if torch.is_grad_enabled():
        _check_autograd(op, lists._asdict())
    if len(lists.params) == 0:
        return step.grad_norm
    if backend.choose(op, lists.params[0].device, None) == "reference":
        arguments = {**lists._asdict(), **options._asdict(), **step.of_definition()}
        found = defined(definition, op, arguments, **arguments)
        return None if found is None else found.to(torch.float32)
    if step.max_grad_norm and step.grad_norm is None:
        step = step._replace(grad_norm=_grad_norm_op(lists.grads, step.grad_scale))
    call(lists, options, step)
    return step.grad_norm
