"""A trainer in a process of its own, where malloc is as stock PyTorch's user gets it."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from torchweld.errors import UserError
from torchweld.training.processes import Processes
from torchweld.training.program import Batch, Program
from torchweld.training.settings import Settings
from torchweld.training.trainer import DTYPES, Trainer


def _serve(
    parent: Connection, program: Program, config: Any, settings: Settings, dtype: str, name: str, threads: int
) -> None:
    """Advances and validates as `parent` asks, until it is gone; answers with a result or with what was raised."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    torch.set_num_threads(threads)
    torch.manual_seed(settings.seed)  # so the weights are those of the parent's first model
    trainer = Trainer(program, config, settings, Processes(), dtype, name)
    parent.send(None)
    while True:
        try:
            task, batches = parent.recv()
        except EOFError:
            return
        try:
            batches = [batch.map(torch.from_numpy) for batch in batches]
            if task == "advance":
                trainer.advance(batches)
                parent.send((trainer.losses[-1], trainer.counts[-1], trainer.seconds[-1]))
            else:
                parent.send(trainer.validate(batches))
        except Exception as error:  # the parent raises it
            parent.send(error)


class ApartTrainer(Trainer):
    """The trainer `name` of the same seed, apart. Takes its turn like the others: they wait for each other."""

    def __init__(self, program: Program, config: Any, settings: Settings, dtype: str, name: str, label: str) -> None:
        self.name, self.settings, self.dtype = label, settings, DTYPES[dtype]
        self.losses, self.seconds, self.counts, self.named, self.validation = [], [], [], {}, []
        spawned = multiprocessing.get_context("spawn")  # a fork would have the parent's malloc
        self._child, theirs = spawned.Pipe()
        arguments = (theirs, program, config, settings, dtype, name, torch.get_num_threads())
        spawned.Process(target=_serve, args=arguments, daemon=True).start()
        theirs.close()
        self._ask()  # until it is ready

    def _ask(self, task: str | None = None, batches: Sequence[Batch] = ()) -> Any:
        try:
            if task is not None:
                self._child.send((task, [batch.map(torch.Tensor.numpy) for batch in batches]))
            answer = self._child.recv()
        except (EOFError, OSError):
            message = f"the process of '{self.name}' has ended (out of memory?); --no-keep-memory does without it"
            raise UserError(message) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def advance(self, parts: Sequence[Batch]) -> None:
        """As `Trainer.advance`."""
        loss, count, seconds = self._ask("advance", parts)
        self.losses.append(loss)
        self.counts.append(count)
        self.seconds.append(seconds)

    def validate(self, batches: Sequence[Batch]) -> float:
        """As `Trainer.validate`."""
        loss: float = self._ask("validate", batches)
        self.validation.append((self.step, loss))
        return loss
