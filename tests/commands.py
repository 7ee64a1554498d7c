"""What the tests of training share: calls of the command line, interrupts, and models away from their beginning."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from torchweld.models import BERTForPreTraining, bert
from torchweld.training import corpus, trainer
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


def perturbed(model: Any) -> Any:
    """Away from the initial values, where biases are 0 and norms are 1."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def tiny_bert(folder: Path, texts: Sequence[str]) -> None:
    """Writes a BERT of random weights, whose WordPiece is made from the texts."""
    tokenizer = corpus.train_wordpiece(texts, 300)
    tokenizer.enable_padding()  # as published tokenizers do; it must not come into the packed batches
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = bert.CONFIGS["tiny"]
    (folder / "config.json").write_text(json.dumps(config.to_hugging_face()))
    torch.manual_seed(0)
    state = {name: t.contiguous() for name, t in BERTForPreTraining(config).to_hugging_face().items()}
    save_file(state, folder / "model.safetensors")


def check_resuming(
    train: Run, resume: Run, monkeypatch: pytest.MonkeyPatch, files: Sequence[str], steps: Sequence[object] = ()
) -> None:
    """A run of 8 steps that is interrupted in the 5th and resumed ends with the files of one that is not."""
    steps = ("--steps", 8, "--validate-every", 4, "--accumulate", 2, *steps)
    assert train(*steps, "--out", "straight")[0] == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        assert train(*steps, "--out", "broken")[0] == 130
    code, out, error = resume("--device", "cpu", "--resume", "broken")
    assert code == 0 and "resuming after step 5" in out, error
    for name in files:
        straight, broken = (Path(run, "checkpoint-8", name).read_bytes() for run in ("straight", "broken"))
        assert straight == broken, name
