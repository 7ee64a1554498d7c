"""How the tests of training call the command line, and interrupt it."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from torchweld.training import trainer
from torchweld.training.program import Batch

# From the words of a command to its exit code, stdout and stderr.
Run = Callable[..., tuple[int, str, str]]


def interrupt_after(monkeypatch: pytest.MonkeyPatch, step: int, times: int = 1) -> None:
    """Sends SIGINT to this process from within that step."""
    advance = trainer.Trainer.advance

    def interrupted(self: trainer.Trainer, parts: list[Batch]) -> None:
        advance(self, parts)
        if self.step == step:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(trainer.Trainer, "advance", interrupted)
