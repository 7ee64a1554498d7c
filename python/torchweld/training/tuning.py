"""What the programs of `torchweld fine-tune` share: the trained BERT they begin from, and packed examples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from torchweld.models.bert import BERTConfig, Headed
from torchweld.training import order
from torchweld.training.program import Batch
from torchweld.training.settings import Recipe, Settings

RECIPE = Recipe(
    steps=0, batch_size=32, learning_rate=1e-4, weight_decay=0.01, beta2=0.999, validate_every=0, keep_best=True
)


class Examples:
    """Sequences that a model learns from, or is asked about."""

    @property
    def lengths(self) -> list[int]:
        """How many tokens each has."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The examples `indices`, packed: tokens, types, bounds, and what is to be learned."""
        raise NotImplementedError

    def by_length(self, size: int) -> list[list[int]]:
        """The numbers of all examples, the shortest first, `size` at once."""
        ordered = sorted(range(len(self)), key=self.lengths.__getitem__)
        return [ordered[i : i + size] for i in range(0, len(ordered), size)]

    def batches(self, size: int) -> list[Batch]:
        """All of it, in order of length."""
        return [self.batch(indices) for indices in self.by_length(size)]


@dataclass(frozen=True)
class Tuning:
    """A program. `task`: its name; config, weights and tokenizer: of the checkpoint of a fresh run."""

    task: str
    options: Mapping[str, str | None]
    config: BERTConfig | None = None
    weights: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    tokenizer: Tokenizer | None = None
    epochs: int = 1
    input: str = "data"
    counted: str = "tokens"
    title: str = "BERT"

    @property
    def name(self) -> str:
        return self.task

    @property
    def command(self) -> str:
        return f"fine-tune {self.task}"

    @property
    def configs(self) -> Mapping[str, Any]:
        return {"checkpoint": self.config}

    @property
    def recipes(self) -> Mapping[str, Recipe]:
        return {"checkpoint": RECIPE}

    def timed(self, settings: Settings, examples: int) -> Settings:
        """With as many steps as the epochs take, and two validations or more."""
        steps = settings.steps or math.ceil(self.epochs * examples / settings.batch_size)
        every = settings.validate_every or max(1, math.ceil(steps / max(2, 2 * self.epochs)))
        return replace(settings, steps=steps, validate_every=every)

    def batches(self, data: Any, settings: Settings, config: BERTConfig, step: int, parts: int) -> list[Batch]:
        """The next examples of an order that is drawn for each epoch."""
        size = settings.batch_size
        indices = order.chosen(settings.seed, len(data.training), step, size)
        return [data.training.batch(indices[i : i + size // parts]) for i in range(0, size, size // parts)]

    def validation(self, data: Any, settings: Settings, config: BERTConfig) -> list[Batch]:
        """All examples of validation."""
        return data.validation.batches(settings.batch_size)

    def losses(self, model: Any, *tensors: Tensor) -> dict[str, Tensor]:
        """That of the model."""
        return {"loss": model.loss(*tensors)}

    def read_config(self, values: dict[str, Any]) -> BERTConfig:
        """As in `Program`."""
        return BERTConfig.from_hugging_face(values)


def encoder_weights(state: Mapping[str, Tensor], model: Headed) -> dict[str, Tensor]:
    """Those of the encoder among the weights of any BERT.

    One without a pooler gets that of `model`, a fresh one, and one with a pooler gives none to a model that has none.
    """
    heads = ("cls.", "classifier.", "qa_outputs.")
    stored = {n.removeprefix("bert."): t for n, t in state.items() if not n.startswith(heads)}
    fresh = {name: t for name, t in model.bert.published().items() if name.startswith("pooler.")}
    return {**fresh, **{name: t for name, t in stored.items() if fresh or not name.startswith("pooler.")}}


@torch.no_grad()
def outputs(model: Any, part: Examples, size: int, precision: Any) -> list[Tensor]:
    """The model's logits for each example, or for each of its tokens, in float32 on the CPU."""
    found: dict[int, Tensor] = {}
    lengths = part.lengths
    device = next(model.parameters()).device
    with precision:
        for indices in part.by_length(size):
            tensors = part.batch(indices).tensors[:3]
            logits = model(*(tensor.to(device) for tensor in tensors)).float().cpu()
            each = logits.split([lengths[i] for i in indices]) if model.per_token else logits.unbind(0)
            found |= zip(indices, each, strict=True)
    return [found[i] for i in range(len(part))]
