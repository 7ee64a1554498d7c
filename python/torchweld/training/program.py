"""What a training program is: the model, its data and its losses. The trainer knows nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from torch import Tensor

from torchweld.models.published import Published
from torchweld.training.findings import Findings
from torchweld.training.settings import Recipe, Settings


@dataclass(frozen=True)
class Batch:
    """What the model sees at once.

    Attributes:
        tensors: the arguments of `Program.losses` after the model.
        weights: over how many items each named loss is a mean.
        count: how many tokens or images the model works on; speed is counted in them.
    """

    tensors: tuple[Tensor, ...]
    weights: Mapping[str, float]
    count: int

    def map(self, change: Callable[[Any], Any]) -> Batch:
        """The same batch with each tensor changed."""
        return Batch(tuple(change(t) for t in self.tensors), self.weights, self.count)


class Data(Protocol):
    """What is learned from."""

    @property
    def digest(self) -> str:
        """Of the contents, so that a resumed run can tell that they are still the same."""

    @property
    def files(self) -> Mapping[str, str]:
        """What a checkpoint keeps beside the model: contents by name, of text `tokenizer.json`."""


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        out: the directory of the run.
        model: in evaluation mode.
        validation: its batches.
        loss, baselines: of these.
        precision: the context in which the model was trained, for what is evaluated after it.
    """

    out: Path
    model: Any
    data: Any
    settings: Settings
    validation: Sequence[Batch]
    loss: float
    baselines: Mapping[str, float]
    precision: AbstractContextManager[None]


class Program(Protocol):
    """One of the models that `torchweld train` knows.

    Attributes:
        name, command: on the command line.
        options: choices of its own that the command line makes; a checkpoint keeps them with the settings.
        defaults: of all options.
        title: in plots.
        input: what it learns from, in error messages.
        configs, recipes: by the name of a size; how each is trained.
        unit: of the sum of the losses.
        counted: what `Batch.count` counts.
    """

    @property
    def name(self) -> str: ...
    @property
    def command(self) -> str: ...
    @property
    def options(self) -> Mapping[str, str | None]: ...
    @property
    def defaults(self) -> Mapping[str, str]: ...
    @property
    def title(self) -> str: ...
    @property
    def input(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def counted(self) -> str: ...
    @property
    def configs(self) -> Mapping[str, Any]: ...
    @property
    def recipes(self) -> Mapping[str, Recipe]: ...

    def data(self, settings: Settings, config: Any, source: Path | None = None) -> Any:
        """Reads `settings.data`. `source`: the checkpoint of a run that goes on, with the `files` of its data.

        Raises:
            UserError: there is nothing to learn from, or not enough.
        """

    def fit(self, settings: Settings, config: Any, data: Any) -> tuple[Settings, Any]:
        """What of a fresh run depends on its data."""

    def model(self, config: Any, ops: ModuleType) -> Published:
        """A fresh one, on `torchweld.ops` or `torchweld.models.stock`."""

    def batches(self, data: Any, settings: Settings, config: Any, step: int, parts: int) -> list[Batch]:
        """The batch of a step in `parts` equal parts: a function of seed and step alone, so resuming is free."""

    def validation(self, data: Any, settings: Settings, config: Any) -> list[Batch]:
        """The same batches every time."""

    def losses(self, model: Any, *tensors: Tensor) -> dict[str, Tensor]:
        """Named means over a batch; the model learns to lower their sum."""

    def read_config(self, values: dict[str, Any]) -> Any:
        """From the contents of `config.json`."""

    def write_config(self, config: Any, data: Any) -> dict[str, Any]:
        """The contents of `config.json`."""

    def describe(self, data: Any, settings: Settings, config: Any) -> tuple[str, str]:
        """What is learned from, and what a step takes."""

    def baselines(self, data: Any, validation: Sequence[Batch]) -> dict[str, float]:
        """Losses to beat, by what they are."""

    def show(self, outcome: Outcome, found: Findings) -> None:
        """What came out, at the end of a run."""
