"""`torchweld train speech`: which word a recording is of, beside dynamic time warping; and `classify` of WAV files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from torchweld.errors import UserError
from torchweld.models import ast
from torchweld.training import checkpoint, order, recordings, scores, voices, warping, waves
from torchweld.training import spectrogram as spectra
from torchweld.training.findings import Findings
from torchweld.training.images import in_turn
from torchweld.training.lines import tell
from torchweld.training.machine import forced_backend, pick_device
from torchweld.training.program import Batch, Outcome
from torchweld.training.recordings import Recordings, Spoken
from torchweld.training.settings import Recipe, Settings

AT_ONCE = 250
PAIRS = 250_000  # of recordings that dynamic time warping compares
SHOWN = 20
PROCESSOR = "speech.json"
_SEEN = {
    "sampling_rate": waves.RATE,
    "samples": waves.LENGTH,
    "hop": spectra.HOP,
    "window": spectra.SPAN,
    "fft": spectra.POINTS,
    "mel_bins": spectra.BANDS,
    "decibels": spectra.DECIBELS,
    "frames": spectra.SEEN,
}


@dataclass(frozen=True)
class Speech:
    """The program."""

    name: str = "speech"
    command: str = "train speech"
    title: str = "AST"
    input: str = "recordings of words"
    unit: str = "nats per recording"
    counted: str = "recordings"
    options: Mapping[str, str | None] = field(default_factory=dict)
    defaults: Mapping[str, str] = field(default_factory=dict)

    @property
    def configs(self) -> Mapping[str, ast.ASTConfig]:
        return ast.CONFIGS

    @property
    def recipes(self) -> Mapping[str, Recipe]:
        return RECIPES

    def data(self, settings: Settings, config: ast.ASTConfig, source: Path | None = None) -> Spoken:
        """The recordings, split; as in `Program`."""
        spoken = recordings.load(settings.data, settings.max_samples)
        return replace(spoken, files={PROCESSOR: json.dumps(_SEEN, indent=1) + "\n"})

    def fit(self, settings: Settings, config: ast.ASTConfig, data: Spoken) -> tuple[Settings, ast.ASTConfig]:
        """The words."""
        return settings, replace(config, labels=data.labels)

    def model(self, config: ast.ASTConfig, ops: ModuleType) -> ast.AST:
        """As in `Program`."""
        return ast.AST(config, ops)

    def batches(self, data: Spoken, settings: Settings, config: ast.ASTConfig, step: int, parts: int) -> list[Batch]:
        """The next recordings of an order that is drawn for each epoch, varied."""
        rng = np.random.default_rng((settings.seed, step))
        chosen = data.training.part(order.chosen(settings.seed, len(data.training), step, settings.batch_size))
        seen = spectra.varied(chosen.waves, rng)
        return [_batch(x, labels) for x, labels in zip(seen.chunk(parts), chosen.labels.chunk(parts), strict=True)]

    def validation(self, data: Spoken, settings: Settings, config: ast.ASTConfig) -> list[Batch]:
        """All recordings of validation."""
        parts = (data.validation.part(part) for part in torch.arange(len(data.validation)).split(AT_ONCE))
        return [_batch(spectra.of(part.waves), part.labels) for part in parts]

    def losses(self, model: ast.AST, *tensors: Tensor) -> dict[str, Tensor]:
        """The mean cross-entropy of the words."""
        return {"loss": model.loss(*tensors)}

    def read_config(self, values: dict[str, Any]) -> ast.ASTConfig:
        """As in `Program`."""
        return ast.ASTConfig.from_hugging_face(values)

    def write_config(self, config: ast.ASTConfig, data: Spoken) -> dict[str, Any]:
        """As in `Program`."""
        return config.to_hugging_face()

    def describe(self, data: Spoken, settings: Settings, config: ast.ASTConfig) -> tuple[str, str]:
        """As in `Program`."""
        source = settings.data[0] if settings.data else f"{voices.PROGRAM}; for the test {voices.SOURCE}, a person"
        sizes = " / ".join(f"{len(part):,}" for part in (data.training, data.validation, data.test))
        speakers = " / ".join(map(str, data.speakers))
        about = f"recordings: {source}; {sizes} for training, validation and test, by {speakers} speakers or voices"
        return f"{about}, {len(data.labels)} words", f"{settings.batch_size} recordings"

    def baselines(self, data: Spoken, validation: Sequence[Batch]) -> dict[str, float]:
        """The entropy of the words' frequencies: what is possible without listening."""
        counts = torch.bincount(data.training.labels, minlength=len(data.labels)).double() + 1
        return {"frequencies of the words": float(-(counts / counts.sum()).log()[data.validation.labels].mean())}

    def show(self, outcome: Outcome, found: Findings) -> None:
        """The scores of the test and of validation beside those of the nearest recording; what was heard wrong."""
        data: Spoken = outcome.data
        with outcome.precision:
            ours = {name: answers(outcome.model, part.waves) for name, part in _parts(data).items()}
        for name, part in reversed(_parts(data).items()):  # scores.json keeps the last, the test
            said = ours[name]
            nearest, count = _nearest(data.training, part, len(data.labels))
            frequent = torch.bincount(data.training.labels, minlength=len(data.labels)).expand_as(said)
            others = {f"nearest of {count:,} recordings, by time warping": nearest, "most frequent word": frequent}
            judged = {who: scores.of_labels(labels, part.labels) for who, labels in others.items()}
            title = f"{len(part):,} recordings of the {name}"
            found.scores(title, {"AST": scores.of_labels(said, part.labels)}, judged)
        right = scores.of_labels(ours["test"], data.test.labels)["accuracy"]
        error = (right * (1 - right) / len(data.test)) ** 0.5
        found.print(
            f"accuracy of the test: {right:.1%}, its standard error {error:.1%} by the {len(data.test):,} recordings "
            f"alone; speakers or voices in it: {data.speakers[2]}"
        )
        found.print(_wrong(data.test, ours["test"], data.labels))
        found.print(f"try it: torchweld classify --checkpoint {outcome.out} WORD.wav ...")


RECIPES = {
    "tiny": Recipe(steps=200, batch_size=32, learning_rate=3e-3, weight_decay=0.05),
    "small": Recipe(steps=1600, batch_size=32, learning_rate=2e-3, weight_decay=0.05, validate_every=200),
    "medium": Recipe(steps=4000, batch_size=128, learning_rate=5e-4, weight_decay=0.05, validate_every=250),
    "ast-base": Recipe(steps=10000, batch_size=128, learning_rate=1e-4, beta2=0.999, accumulate=4),
}


def _parts(data: Spoken) -> dict[str, Recordings]:
    return {"test": data.test, "validation": data.validation}


def _batch(seen: Tensor, labels: Tensor) -> Batch:
    return Batch((seen, labels), {"loss": len(labels)}, len(labels))


@torch.no_grad()
def answers(model: ast.AST, waves: Tensor) -> Tensor:
    """The logits of recordings (N, LENGTH), in float32 on the CPU: (N, labels)."""
    parts = (model(spectra.of(part).to(model.first.device)).float().cpu() for part in waves.split(AT_ONCE))
    return torch.cat(list(parts))


def _nearest(training: Recordings, asked: Recordings, labels: int) -> tuple[Tensor, int]:
    """The words of the nearest recordings, as logits, and out of how many: each word in turn, as PAIRS allows."""
    count = min(len(training), max(labels, PAIRS // len(asked)))
    some = training.part(in_turn(training.labels)[:count])
    known, unknown = (_cepstra(part.waves) for part in (some, asked))
    best = torch.tensor([int(warping.distances(one, known).argmin()) for one in unknown])
    return torch.nn.functional.one_hot(some.labels[best], labels), count


def _cepstra(waves: Tensor) -> list[warping.Floats]:
    decibels = torch.cat([spectra.log_mel(part) for part in waves.split(AT_ONCE)])
    return [warping.cepstra(each) for each in decibels.double().numpy()]


def _wrong(part: Recordings, logits: Tensor, labels: Sequence[str]) -> Table:
    """The recordings that were taken for another word, the surest first."""
    sure, said = logits.softmax(1).max(1)
    wrong = (said != part.labels).nonzero()[:, 0]
    wrong = wrong[sure[wrong].argsort(descending=True)][:SHOWN]
    shown = Table("recording", "word", "taken for", "probability", title="heard wrong, the surest first")
    for i in wrong.tolist():
        shown.add_row(part.names[i], labels[int(part.labels[i])], labels[int(said[i])], f"{float(sure[i]):.3f}")
    return shown


def classify(args: argparse.Namespace, directory: Path) -> int:
    """`torchweld classify` of recordings: a line for each, with tabs between its parts."""
    device = pick_device(args.device)
    if not args.file:
        raise UserError("classify: expected the names of WAV files, but got none; an AST reads no text")
    seen = checkpoint.read_json(directory / PROCESSOR)
    if seen != _SEEN:
        raise UserError(
            f"{directory / PROCESSOR}: expected {_SEEN}, but got {seen}; train it with `torchweld train speech`"
        )
    config, weights = checkpoint.load_model(directory, ast.ASTConfig.from_hugging_face)
    read = torch.from_numpy(np.stack([waves.read(Path(path)) for path in args.file]))
    with forced_backend(args.backend, device):
        model = ast.AST(config).eval()
        model.load_hugging_face(weights)
        model.to(device)
        tell(args.file, answers(model, read), config.labels, args.json)
    return 0


SPEECH = Speech()
