"""A training run: what it learns from, who learns, and what is kept of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torchweld.training import checkpoint, optimizer_state, shards
from torchweld.training.processes import Processes
from torchweld.training.program import Batch, Data, Program
from torchweld.training.settings import Settings
from torchweld.training.trainer import Trainer


@dataclass
class Job:
    """A run that is ready to go.

    Attributes:
        trainers: ours, then with --compare its rivals.
        distributed: each process writes its own parts of a checkpoint.
    """

    program: Program
    out: Path
    settings: Settings
    data: Data
    validation: list[Batch]
    trainers: list[Trainer]
    processes: Processes
    distributed: bool = False

    @property
    def config(self) -> Any:
        """Of the model."""
        return self.trainers[0].model.config

    def batches(self, step: int) -> list[Batch]:
        """The parts of a step's batch, of all processes."""
        parts = self.processes.replicas * self.settings.accumulate
        return self.program.batches(self.data, self.settings, self.config, step, parts)

    def save(self) -> Path:
        """Writes a checkpoint of our trainer; returns its directory. All processes call this."""
        ours = self.trainers[0]
        training = {
            "settings": asdict(self.settings),
            "digest": self.data.digest,
            "losses": ours.losses,
            "validation": ours.validation,
        }
        if self.distributed:
            return self._save_parts("checkpoint", {"step": ours.step, **training})
        state = optimizer_state.tensors_of(
            ours.model, ours.optimizer, lambda name, t: ours.sharing.whole_state(ours.model, name, t)
        )
        weights = self._weights()
        if self.processes.first:
            return checkpoint.save(self.out, ours.step, weights, state, training)
        return self.out

    def save_best(self) -> None:
        """Keeps the weights of our trainer if no validation was better than the last one."""
        ours = self.trainers[0]
        if ours.validation[-1][1] <= min(loss for _, loss in ours.validation):
            if self.distributed:
                self._save_parts("best", None)
                return
            weights = self._weights()
            if self.processes.first:
                checkpoint.save_best(self.out, ours.step, weights)

    def _save_parts(self, kind: str, training: dict[str, Any] | None) -> Path:
        ours = self.trainers[0]
        files = {
            "config.json": checkpoint.as_json(self.program.write_config(self.config, self.data)),
            checkpoint.PARTS: checkpoint.as_json({"program": self.program.name}),
            **self.data.files,
        }
        parts = {"model": shards.of_model(ours.model, ours.sharing)}
        if training is not None:
            files["training.json"] = checkpoint.as_json(training)
            parts["optimizer"] = shards.of_optimizer(ours.model, ours.optimizer, ours.sharing)
        return shards.save(self.out, f"{kind}-{ours.step}", files, parts, self.processes)

    def _weights(self) -> checkpoint.Weights:
        config = self.program.write_config(self.config, self.data)
        ours = self.trainers[0]
        return checkpoint.Weights(config, ours.sharing.whole(ours.model), self.data.files)
