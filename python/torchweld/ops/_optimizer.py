"""What the optimizers' ops share: grad_norm, the arguments of every step, and who serves which tensor of a list."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from torchweld import backend, reference
from torchweld.ops._arguments import check_dense, check_memory, defined, flag, number
from torchweld.ops._register import register

Lists = dict[str, Sequence[Tensor]]

# ---- Implementation. The bindings check everything before they touch memory, and name what the kernels do not take:
# those tensors go to the reference, the others to the kernels.


def _workspace(module: backend.Kernels, count: int, device: torch.device) -> Tensor | None:
    """Room for the kernels' table of `count` tensors; None where they read it as it was made."""
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
    refused = module.grad_norm(grads, scale, partial, norm, table)
    if not refused:
        return norm
    for _, reason in refused:
        backend.choose("grad_norm", device, reason)
    return reference.grad_norm(grads, grad_scale=grad_scale).to(torch.float32)


@dataclass
class Common:
    """What every step is told besides its own lists and hyper-parameters, as the schemas have it (COMMON)."""

    lr: float
    lr_tensor: Tensor | None
    weight_decay: float
    maximize: bool
    max_grad_norm: float
    grad_norm: Tensor | None
    grad_scale: Tensor | None
    found_inf: Tensor | None
    zero_grads: bool
    rounding_seed: int | None = None


COMMON = (
    "float lr, Tensor? lr_tensor, float weight_decay, bool maximize, float max_grad_norm, Tensor? grad_norm,"
    " Tensor? grad_scale, Tensor? found_inf, bool zero_grads"
)


def run_step(op: str, lists: Lists, own: dict[str, Any], common: Common, definition: Callable[..., Any]) -> None:
    """One step by the kernels, of what they do not take by `definition`; `own` are the op's own hyper-parameters."""
    device = lists["params"][0].device
    module = backend.module(device)
    if common.lr_tensor is not None and common.lr_tensor.is_cpu:
        check_memory(op, lr=common.lr_tensor)
        common.lr, common.lr_tensor = common.lr_tensor.item(), None
    lr_tensor, norm, grad_scale, found_inf = (
        _scalar(op, name, t, device)
        for name, t in (
            ("lr", common.lr_tensor),
            ("grad_norm", common.grad_norm),
            ("grad_scale", common.grad_scale),
            ("found_inf", common.found_inf),
        )
    )

    def run(lists: Lists) -> list[tuple[int, str]]:
        table = _workspace(module, len(lists["params"]), device)
        first = (common.lr, lr_tensor, common.weight_decay, common.maximize, common.max_grad_norm)
        options = (*first, norm, grad_scale, found_inf, common.zero_grads, common.rounding_seed, table)
        return getattr(module, op)(*lists.values(), *own.values(), options)

    refused = run(lists)
    if refused:
        for _, reason in refused:
            backend.choose(op, device, reason)
        rest = {index for index, _ in refused}
        run({name: [t for i, t in enumerate(each) if i not in rest] for name, each in lists.items()})
        seed = {} if common.rounding_seed is None else {"rounding_seed": common.rounding_seed}
        definition(
            **{name: [t for i, t in enumerate(each) if i in rest] for name, each in lists.items()},
            **own,
            **seed,
            lr=common.lr if common.lr_tensor is None else common.lr_tensor,
            weight_decay=common.weight_decay,
            maximize=common.maximize,
            max_grad_norm=None if common.grad_norm is None else common.max_grad_norm,
            grad_norm=common.grad_norm,
            grad_scale=common.grad_scale,
            found_inf=common.found_inf,
            zero_grads=common.zero_grads,
        )
    # An op that is defined by Library.define does not count its mutations for autograd by itself.
    stored = common.zero_grads or common.grad_scale is not None
    mutated = [t for name, each in lists.items() if stored or name != "grads" for t in each]
    torch.autograd.graph.increment_version(mutated)


# ---- Fake


def _grad_norm_fake(grads: Sequence[Tensor], grad_scale: Tensor | None) -> Tensor:
    return grads[0].new_empty((), dtype=torch.float32)


def step_fake(*args: object) -> None:
    """Of every step: it returns nothing."""
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
    """The tensors of every argument as a list: an iterator gives them once."""
    for name, each in lists.items():
        found = each if type(each) is list or type(each) is tuple else _listed(op, name, each)
        if len(found) > 0 and not isinstance(found[0], Tensor):  # the bindings ask the others
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


def take_step(
    op: str,
    call: Callable[..., None],
    definition: Callable[..., Tensor | None],
    lists: Lists,
    own: dict[str, Any],
    lr: float | Tensor,
    common: dict[str, Any],
) -> Tensor | None:
    """The public functions, once their own arguments are checked: reference or kernels; the norm first, if needed."""
    common["weight_decay"] = number(op, "weight_decay", common["weight_decay"])
    for name in ("maximize", "zero_grads"):
        common[name] = flag(op, name, common[name])
    limit, norm = common["max_grad_norm"], common["grad_norm"]
    if limit is not None:
        limit = common["max_grad_norm"] = number(op, "max_grad_norm", limit, "a number or None")
        if not limit > 0:
            raise ValueError(f"[{op}] max_grad_norm: expected max_grad_norm > 0, or None, but got {limit}")
    params, grads = lists["params"], lists["grads"]
    for name in ("grad_norm", "grad_scale", "found_inf"):
        if common[name] is not None:
            _check_scalar(op, name, common[name])
    if isinstance(lr, Tensor):
        _check_scalar(op, "lr", lr)
    else:
        lr = number(op, "lr", lr, "a number or a torch.Tensor of one element")
    if torch.is_grad_enabled():
        _check_autograd(op, lists)
    if len(params) == 0:
        return norm
    if backend.choose(op, params[0].device, None) == "reference":
        tensors = {**lists, **{name: common[name] for name in ("grad_norm", "grad_scale", "found_inf")}, "lr": lr}
        found = defined(definition, op, tensors, **lists, **own, lr=lr, **common)
        return None if found is None else found.to(torch.float32)
    if limit is not None and norm is None:
        norm = _grad_norm_op(grads, common["grad_scale"])
    common = common | {"max_grad_norm": limit or 0.0, "grad_norm": None if limit is None else norm}
    tensor = lr if isinstance(lr, Tensor) else None
    call(*lists.values(), *own.values(), 0.0 if tensor is not None else lr, tensor, *common.values())
    return norm
