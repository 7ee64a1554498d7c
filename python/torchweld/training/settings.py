"""What a training run is made from: the choices on the command line, completed by a recipe for each config."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from torchweld.errors import UserError

WARM_UP = 0.1
FINAL_RATE = 0.05
SGD_RATE = 100.0  # times Adam's, whose steps do not shrink with the gradient


@dataclass(frozen=True)
class Recipe:
    """How a model is trained, whatever its text and its seed.

    Attributes:
        batch_size: of all processes together.
        learning_rate: at its peak.
        accumulate: each batch is worked on in as many parts, one after another.
        optimizer: a name out of `optimizers.OPTIMIZERS`.
        beta2: of Adam; lower than usual: a run of a few hundred steps has no long memory to keep.
        validate_every: steps between validations.
        keep_best: the weights of the best validation are kept as well.
    """

    steps: int
    batch_size: int
    learning_rate: float
    accumulate: int = 1
    optimizer: str = "adamw"
    weight_decay: float = 0.1
    beta2: float = 0.99
    validate_every: int = 100
    keep_best: bool = False

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


class Choices(Protocol):
    """What of a program the settings are made from, as in `program.Program`."""

    @property
    def name(self) -> str: ...
    @property
    def recipes(self) -> Mapping[str, Recipe]: ...
    @property
    def options(self) -> Mapping[str, str | None]: ...
    @property
    def defaults(self) -> Mapping[str, str]: ...


@dataclass(frozen=True, kw_only=True)
class Settings(Recipe):
    """All choices that the weights depend on; a checkpoint keeps them.

    Attributes:
        program: its name.
        config: the name of a size.
        data: files; None for what the program has by itself.
        options: the program's own choices.
        max_samples: how many of the samples for training are used; None for all.
    """

    program: str = "gpt2"
    config: str
    seed: int
    data: list[str] | None
    options: dict[str, str] = field(default_factory=dict)
    max_samples: int | None = None

    @classmethod
    def fresh(cls, args: argparse.Namespace, program: Choices, processes: int) -> Settings:
        """From the command line, and from the config's recipe where it says nothing."""
        recipes = program.recipes
        name = args.config or ("small" if "small" in recipes else next(iter(recipes)))
        if name not in recipes:
            raise UserError(f"--config: expected one of {', '.join(recipes)}, but got {name!r}")
        own = {option: program.options.get(option) or default for option, default in program.defaults.items()}
        chosen = {"program": program.name, "config": name, "seed": 0, "data": None, "options": own}
        settings = cls(**{**asdict(recipes[name]), **chosen, **_given(args)})
        if settings.optimizer == "sgd" and args.learning_rate is None:
            settings = replace(settings, learning_rate=SGD_RATE * settings.learning_rate)
        return settings._divided_among(processes)

    @classmethod
    def resumed(
        cls,
        args: argparse.Namespace,
        program: Choices,
        stored: dict[str, Any],
        step: int,
        processes: int,
    ) -> Settings:
        """Those of the stored run, which has done `step` steps; the command line may replace all but the model."""
        try:
            settings = cls(**stored)
        except TypeError as error:
            raise UserError(
                f"training.json: expected the settings of `torchweld train`, but got others: {error}"
            ) from None
        if settings.program != program.name:
            raise UserError(
                f"--resume: expected a run of {program.name}, but got one of {settings.program}; resume it with that"
            )
        names = ("config", "optimizer", "max_samples")
        fixed = {**{name: getattr(settings, name) for name in names}, **settings.options}
        for name, given in {**{name: getattr(args, name) for name in names}, **program.options}.items():
            if given not in (None, was := fixed.get(name)):
                raise UserError(
                    f"--{name.replace('_', '-')}: expected {was!r}, with which the run was started, but got {given!r}; "
                    f"leave it out with --resume"
                )
        settings = replace(settings, **_given(args))
        if settings.steps < step:
            raise UserError(f"--steps: expected at least the {step} that the run has done, but got {settings.steps}")
        return settings._divided_among(processes)

    def _divided_among(self, processes: int) -> Settings:
        for option, parts in (
            ("number of processes", processes),
            ("parts of --accumulate", processes * self.accumulate),
        ):
            if self.batch_size % parts:
                raise UserError(
                    f"--batch-size: expected a multiple of the {option}, {parts}, but got {self.batch_size}"
                )
        return self


def _given(args: argparse.Namespace) -> dict[str, Any]:
    names = ["steps", "batch_size", "learning_rate", "seed", "data", "accumulate", "optimizer", "validate_every"]
    names += ["keep_best", "max_samples"]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if "data" in given:  # the run may be resumed from elsewhere
        given["data"] = [str(Path(path).absolute()) for path in given["data"]]
    return given
