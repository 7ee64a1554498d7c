"""`torchweld train recommender`: a GPT-2 whose tokens are items says what a user has next.

As Kang and McAuley, "Self-Attentive Sequential Recommendation", arXiv:1808.09781. The last item of each user is for the
test, the one before for validation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchweld.models import gpt2
from torchweld.training import order, packages, ranking, ratings
from torchweld.training.findings import Findings
from torchweld.training.program import Batch, Outcome
from torchweld.training.ratings import Ratings
from torchweld.training.settings import Recipe, Settings

START = 0  # the token before a user's first item; items follow from 1 on
NOTHING = -100  # a target that does not count
AT_ONCE = 64


@dataclass(frozen=True)
class Recommender:
    """The program."""

    name: str = "recommender"
    command: str = "train recommender"
    title: str = "GPT-2 over items"
    input: str = "ratings"
    unit: str = "nats per item"
    counted: str = "items"
    options: Mapping[str, str | None] = field(default_factory=dict)
    defaults: Mapping[str, str] = field(default_factory=dict)

    @property
    def configs(self) -> Mapping[str, gpt2.GPT2Config]:
        return CONFIGS

    @property
    def recipes(self) -> Mapping[str, Recipe]:
        return RECIPES

    def data(self, settings: Settings, config: gpt2.GPT2Config, source: Path | None = None) -> Ratings:
        """The ratings; as in `Program`."""
        return replace(ratings.load(settings.data), learned=settings.max_samples)

    def fit(self, settings: Settings, config: gpt2.GPT2Config, data: Ratings) -> tuple[Settings, gpt2.GPT2Config]:
        """A token for each item."""
        return settings, replace(config, vocab_size=1 + len(data.items))

    def model(self, config: gpt2.GPT2Config, ops: ModuleType) -> gpt2.GPT2:
        """As in `Program`."""
        return gpt2.GPT2(config, ops)

    def batches(self, data: Ratings, settings: Settings, config: gpt2.GPT2Config, step: int, parts: int) -> list[Batch]:
        """Windows of the histories of the next users, of an order that is drawn for each epoch."""
        size, rng = settings.batch_size, np.random.default_rng((settings.seed, step))
        users = order.chosen(settings.seed, len(data.histories[: data.learned]), step, size)
        windows = [_window(data.histories[user][:-2], config.n_positions, rng) for user in users]
        return [_batch(windows[i : i + size // parts]) for i in range(0, size, size // parts)]

    def validation(self, data: Ratings, settings: Settings, config: gpt2.GPT2Config) -> list[Batch]:
        """The last item but one of each user, after those before it."""
        rows = [_asked(history[:-1], config.n_positions) for history in data.histories]
        return [_batch(rows[i : i + AT_ONCE]) for i in range(0, len(rows), AT_ONCE)]

    def losses(self, model: gpt2.GPT2, *tensors: Tensor) -> dict[str, Tensor]:
        """The mean cross-entropy of the next item, in nats."""
        inputs, targets = tensors
        return {"loss": model.loss(inputs, targets)}

    def read_config(self, values: dict[str, Any]) -> gpt2.GPT2Config:
        """As in `Program`."""
        return gpt2.GPT2Config.from_hugging_face(values)

    def write_config(self, config: gpt2.GPT2Config, data: Ratings) -> dict[str, Any]:
        """As in `Program`."""
        return {**config.to_hugging_face(), "bos_token_id": START, "eos_token_id": START}

    def describe(self, data: Ratings, settings: Settings, config: gpt2.GPT2Config) -> tuple[str, str]:
        """As in `Program`."""
        source = " and ".join(settings.data or [str(packages.find("ml-100k"))])
        count = sum(map(len, data.histories))
        dropped = f"; {data.dropped} with fewer than {ratings.LEAST} left out" if data.dropped else ""
        sizes = f"{count:,} of {len(data.items):,} items by {len(data.histories):,} users{dropped}"
        return f"ratings: {source}, {sizes}", f"{settings.batch_size} users, up to {config.n_positions} items of each"

    def baselines(self, data: Ratings, validation: Sequence[Batch]) -> dict[str, float]:
        """The cost of the same items by how often they were had."""
        wanted = torch.tensor([history[-2] for history in data.histories])
        return {"popularity": ranking.entropy(data.training, wanted, len(data.items))}

    def show(self, outcome: Outcome, found: Findings) -> None:
        """Where the last item of each user is ranked, among all that the user has not had, beside the baselines."""
        data, model = outcome.data, outcome.model
        before, wanted = [history[:-1] for history in data.histories], [history[-1] for history in data.histories]
        with outcome.precision:
            said = next_items(model, before)
        own = ranking.judge(said, before, wanted)
        others = ranking.baselines(data.training, before, wanted, len(data.items))
        title = f"the last item of {len(wanted):,} users, among {len(data.items):,}"
        found.scores(title, {"GPT-2": own}, others)
        for history in before[:3]:
            had = "; ".join(data.titles[item - 1] for item in history[-3:])
            found.print(f"after {had}: {'; '.join(data.titles[i - 1] for i, _ in likeliest(model, history, 3))}")
        last = data.titles[before[0][-1] - 1]
        found.print(f'try it: torchweld recommend --checkpoint {outcome.out} "{last}"')


CONFIGS = {
    "tiny": gpt2.GPT2Config(n_positions=16, n_embd=32, n_layer=1, n_head=2),
    "small": gpt2.GPT2Config(n_positions=64, n_embd=64, n_layer=2, n_head=2, dropout=0.2),
    "medium": gpt2.GPT2Config(n_positions=200, n_embd=128, n_layer=3, n_head=4, dropout=0.2),
    "large": gpt2.GPT2Config(n_positions=200, n_embd=256, n_layer=6, n_head=8, dropout=0.2),
}
RECIPES = {
    "tiny": Recipe(steps=100, batch_size=16, learning_rate=1e-2),
    "small": Recipe(steps=2000, batch_size=32, learning_rate=2e-3, validate_every=100, keep_best=True),
    "medium": Recipe(steps=5000, batch_size=64, learning_rate=1e-3, validate_every=250, keep_best=True),
    "large": Recipe(steps=20000, batch_size=128, learning_rate=5e-4, validate_every=500, keep_best=True),
}


def _window(history: Sequence[int], most: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Inputs and targets: up to `most` items in a row, each asked for after those before it."""
    start = int(rng.integers(max(0, len(history) - most) + 1))
    targets = list(history[start : start + most])
    return [history[start - 1] if start else START, *targets[:-1]], targets


def _asked(history: Sequence[int], most: int) -> tuple[list[int], list[int]]:
    """The same for the last item alone."""
    inputs = [START, *history[:-1]][-most:]
    return inputs, [NOTHING] * (len(inputs) - 1) + [history[-1]]


def _batch(windows: Sequence[tuple[list[int], list[int]]]) -> Batch:
    longest = max(len(inputs) for inputs, _ in windows)
    inputs = torch.tensor([row + [START] * (longest - len(row)) for row, _ in windows])
    targets = torch.tensor([row + [NOTHING] * (longest - len(row)) for _, row in windows])
    return Batch((inputs, targets), {"loss": int((targets != NOTHING).sum())}, sum(len(row) for row, _ in windows))


@torch.no_grad()
def next_items(model: gpt2.GPT2, histories: Sequence[Sequence[int]]) -> Tensor:
    """The logits of what follows each history, in float32 on the CPU: (histories, items + 1)."""
    found, most = [], model.config.n_positions
    for i in range(0, len(histories), AT_ONCE):
        rows = [[START, *history][-most:] for history in histories[i : i + AT_ONCE]]
        longest = max(map(len, rows))
        tokens = torch.tensor([row + [START] * (longest - len(row)) for row in rows], device=model.wte.weight.device)
        ends = torch.tensor([len(row) - 1 for row in rows], device=tokens.device)
        hidden = model.hidden(tokens)[torch.arange(len(rows), device=tokens.device), ends]
        found.append(model.logits(hidden).float().cpu())
    return torch.cat(found)


def likeliest(model: gpt2.GPT2, history: Sequence[int], count: int) -> list[tuple[int, float]]:
    """The items that follow most likely, without those of the history, and their probabilities."""
    logits = next_items(model, [history])[0]
    logits[[START, *history]] = -math.inf
    best = logits.softmax(0).topk(min(count, max(0, int(logits.isfinite().sum()))))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


RECOMMENDER = Recommender()
