"""What an optimizer keeps of each parameter, by the parameter's name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchweld.errors import UserError
from torchweld.training.optimizers import choice


def tensors_of(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, whole: Callable[[str, Tensor], Tensor]
) -> dict[str, Tensor]:
    """The optimizer's state by parameter name. `whole(name, value)`: of a state that is spread over processes."""
    return {
        f"{name}/{key}": whole(name, value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def restore(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    name: str,
    tensors: dict[str, Tensor],
    own: Callable[[str, Tensor], Tensor],
) -> None:
    """The inverse of `tensors_of`, for the optimizer `name`; `own` is that of `whole`.

    Raises:
        UserError: the tensors belong to another model or optimizer.
    """
    states: dict[str, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        parameter, _, key = path.rpartition("/")
        states.setdefault(parameter, {})[key] = tensor
    names, kept = {parameter: name for name, parameter in model.named_parameters()}, choice(name)
    expected = {(name, key) for name in names.values() for key in (*kept.scalars, *kept.wide)}
    fits = {(name, key) for name, state in states.items() for key in state} == expected and all(
        states[name][key].shape == p.shape for p, name in names.items() for key in kept.wide
    )
    if not fits:
        what = "momentum" if name == "sgd" else "Adam's moments"
        raise UserError(
            f"optimizer.safetensors: expected {what} of every parameter, but got others; the checkpoint is damaged or "
            f"of another kind"
        )
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        index: {key: own(names[p], value) for key, value in states[names[p]].items()} for index, p in enumerate(ordered)
    }
    # load_state_dict knows which of them move to the parameter's device and dtype.
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
