"""What a training run is made from: the choices on the command line, completed by a recipe for each config."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torchweld.errors import UserError
from torchweld.models.gpt2 import CONFIGS

WARM_UP = 0.1
FINAL_RATE = 0.05


@dataclass(frozen=True)
class Recipe:
    """How a model is trained, whatever its text and its seed. `batch_size`: of all processes together."""

    steps: int
    batch_size: int
    learning_rate: float

    @property
    def warm_up(self) -> int:
        """Steps of it, a tenth of all."""
        return max(1, int(WARM_UP * self.steps))

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ...: linear warm-up, then a cosine down to a twentieth."""
        if step < self.warm_up:
            return self.learning_rate * (step + 1) / self.warm_up
        progress = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.learning_rate * (FINAL_RATE + (1.0 - FINAL_RATE) * cosine)


# "small" is made for two CPU cores and three minutes, "medium" for fifteen; the published sizes want a GPU. Their rates
# follow Brown et al., arXiv:2005.14165, table 2.1.
RECIPES = {
    "tiny": Recipe(steps=200, batch_size=8, learning_rate=3e-3),
    "small": Recipe(steps=900, batch_size=4, learning_rate=3e-3),
    "medium": Recipe(steps=600, batch_size=4, learning_rate=1.5e-3),
    "gpt2": Recipe(steps=2000, batch_size=16, learning_rate=6e-4),
    "gpt2-medium": Recipe(steps=2000, batch_size=16, learning_rate=3e-4),
    "gpt2-large": Recipe(steps=2000, batch_size=8, learning_rate=2.5e-4),
    "gpt2-xl": Recipe(steps=2000, batch_size=8, learning_rate=2e-4),
}


@dataclass(frozen=True)
class Settings(Recipe):
    """All choices that the weights depend on; a checkpoint keeps them. `data`: files, None for the standard library."""

    config: str
    seed: int
    data: list[str] | None

    @classmethod
    def fresh(cls, args: argparse.Namespace, processes: int) -> Settings:
        """From the command line, and from the config's recipe where it says nothing."""
        name = args.config or "small"
        if name not in CONFIGS:
            raise UserError(f"--config: expected one of {', '.join(CONFIGS)}, but got {name!r}")
        settings = cls(**{**asdict(RECIPES[name]), "config": name, "seed": 0, "data": None, **_given(args)})
        return settings._divided_among(processes)

    @classmethod
    def resumed(cls, args: argparse.Namespace, stored: dict[str, Any], step: int, processes: int) -> Settings:
        """Those of the stored run, which has done `step` steps; the command line may replace all but the model."""
        try:
            settings = cls(**stored)
        except TypeError as error:
            raise UserError(
                f"training.json: expected the settings of `torchweld train`, but got others: {error}"
            ) from None
        if args.config not in (None, settings.config):
            raise UserError(
                f"--config: expected {settings.config!r}, with which the run was started, but got {args.config!r}; "
                f"leave it out with --resume"
            )
        settings = replace(settings, **_given(args))
        if settings.steps < step:
            raise UserError(f"--steps: expected at least the {step} that the run has done, but got {settings.steps}")
        return settings._divided_among(processes)

    def _divided_among(self, processes: int) -> Settings:
        if self.batch_size % processes:
            raise UserError(
                f"--batch-size: expected a multiple of the number of processes, {processes}, but got {self.batch_size}"
            )
        return self


def _given(args: argparse.Namespace) -> dict[str, Any]:
    names = ("steps", "batch_size", "learning_rate", "seed", "data")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if "data" in given:  # the run may be resumed from elsewhere
        given["data"] = [str(Path(path).absolute()) for path in given["data"]]
    return given
