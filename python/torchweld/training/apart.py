"""A trainer in a process of its own, where malloc is as stock PyTorch's user gets it."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from torchweld.errors import UserError
from torchweld.models.gpt2 import GPT2Config
from torchweld.training.processes import Processes
from torchweld.training.settings import Settings
from torchweld.training.trainer import DTYPES, Trainer


def _serve(parent: Connection, config: GPT2Config, settings: Settings, dtype: str, name: str, threads: int) -> None:
    """Advances and validates as `parent` asks, until it is gone; answers with a result or with what was raised."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    torch.set_num_threads(threads)
    torch.manual_seed(settings.seed)  # so the weights are those of the parent's first model
    trainer = Trainer(config, settings, Processes(), dtype, name)
    parent.send(None)
    while True:
        try:
            batches = parent.recv()
        except EOFError:
            return
        try:
            if isinstance(batches, tuple):
                trainer.advance(*map(torch.from_numpy, batches))
                parent.send((trainer.losses[-1], trainer.seconds[-1]))
            else:
                parent.send(trainer.validate([(torch.from_numpy(x), torch.from_numpy(y)) for x, y in batches]))
        except Exception as error:  # the parent raises it
            parent.send(error)


class ApartTrainer(Trainer):
    """The trainer `name` of the same seed, apart. Takes its turn like the others: they wait for each other."""

    def __init__(self, config: GPT2Config, settings: Settings, dtype: str, name: str, label: str) -> None:
        self.name, self.settings, self.dtype = label, settings, DTYPES[dtype]
        self.losses, self.seconds, self.validation = [], [], []
        spawned = multiprocessing.get_context("spawn")  # a fork would have the parent's malloc
        self._child, theirs = spawned.Pipe()
        arguments = (theirs, config, settings, dtype, name, torch.get_num_threads())
        spawned.Process(target=_serve, args=arguments, daemon=True).start()
        theirs.close()
        self._ask(None)  # until it is ready

    def _ask(self, batches: object) -> Any:
        try:
            if batches is not None:
                self._child.send(batches)
            answer = self._child.recv()
        except (EOFError, OSError):
            message = f"the process of '{self.name}' has ended (out of memory?); --no-keep-memory does without it"
            raise UserError(message) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def advance(self, inputs: Tensor, targets: Tensor) -> None:
        """As `Trainer.advance`."""
        loss, seconds = self._ask((inputs.numpy(), targets.numpy()))
        self.losses.append(loss)
        self.seconds.append(seconds)

    def validate(self, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
        """As `Trainer.validate`."""
        loss: float = self._ask([(x.numpy(), y.numpy()) for x, y in batches])
        self.validation.append((self.step, loss))
        return loss
