"""The optimizers of `--optimizer`: ours with clipping inside the step, and torch's fused ones for the other side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import torchweld.optim
from torchweld.errors import UserError
from torchweld.training.settings import Recipe

MAX_GRAD_NORM = 1.0
MOMENTUM = 0.9


@dataclass(frozen=True)
class Choice:
    """Ours and torch's optimizer of one name.

    Attributes:
        decays: whether weight decay is decoupled from the gradient; else none is used.
        state: what it keeps for each parameter; `wide` is of the parameter's shape.
    """

    ours: Callable[..., torch.optim.Optimizer]
    torchs: Callable[..., torch.optim.Optimizer]
    decays: bool
    wide: tuple[str, ...]
    scalars: tuple[str, ...] = ()


_MOMENTS = ("exp_avg", "exp_avg_sq")
OPTIMIZERS = {
    "adamw": Choice(torchweld.optim.AdamW, torch.optim.AdamW, True, _MOMENTS, ("step",)),
    "adam": Choice(torchweld.optim.Adam, torch.optim.Adam, False, _MOMENTS, ("step",)),
    "sgd": Choice(torchweld.optim.SGD, torch.optim.SGD, False, ("momentum_buffer",)),
}


def choice(name: str) -> Choice:
    """The optimizer `name`.

    Raises:
        UserError: there is none.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"--optimizer: expected one of {', '.join(OPTIMIZERS)}, but got {name!r}")
    return OPTIMIZERS[name]


def build(recipe: Recipe, parameter_groups: Callable[[float], list[dict[str, Any]]], ours: bool) -> Any:
    """The recipe's optimizer; ours clips the gradients by their global norm in its step."""
    chosen = choice(recipe.optimizer)
    groups = parameter_groups(recipe.weight_decay if chosen.decays else 0.0)
    options: dict[str, Any] = {"lr": recipe.learning_rate}
    if recipe.optimizer == "sgd":
        options["momentum"] = MOMENTUM
    else:
        options["betas"] = (0.9, recipe.beta2)
    if ours:
        return chosen.ours(groups, **options, max_grad_norm=MAX_GRAD_NORM)
    return chosen.torchs(groups, **options, fused=True)
