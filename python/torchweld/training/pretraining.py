"""`torchweld train bert`: masked words, and whether one segment follows the other (arXiv:1810.04805, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchweld.errors import UserError
from torchweld.models import bert
from torchweld.training import checkpoint, corpus
from torchweld.training.findings import Findings
from torchweld.training.packing import pack
from torchweld.training.program import Batch, Outcome
from torchweld.training.settings import Recipe, Settings

Tokens = NDArray[np.int64]

MASKED = 0.15
SHORT = 0.1  # of the pairs, which are of any length
LEAST = 8  # tokens of a document that a pair can be cut from
VALIDATION_PAIRS = 512
OVERLAP_PAIRS = 1024


@dataclass(frozen=True)
class Pair:
    """Two segments, and whether the second one is from elsewhere."""

    first: Tokens
    second: Tokens
    random: bool


class Documents:
    """The tokens of one part of a corpus, and where its documents lie."""

    def __init__(self, tokens: Tensor, separator: int) -> None:
        self.tokens = tokens.numpy().astype(np.int64)
        ends = np.flatnonzero(self.tokens == separator)
        bounds = np.concatenate([[-1], ends, [len(self.tokens)]])
        lengths = np.diff(bounds) - 1
        long = lengths >= LEAST
        self.starts, self.lengths = bounds[:-1][long] + 1, lengths[long]
        self.weights = np.cumsum(self.lengths)

    def first(self, most: int) -> Documents:
        """As many of the documents as have `most` tokens, the last one cut."""
        if most >= self.weights[-1]:
            return self
        last = int(np.searchsorted(self.weights, most))
        shorter = copy(self)
        shorter.starts, shorter.lengths = self.starts[: last + 1], self.lengths[: last + 1].copy()
        shorter.lengths[last] -= min(int(self.weights[last]) - most, int(self.lengths[last]) - LEAST)
        shorter.weights = np.cumsum(shorter.lengths)
        shorter.tokens = self.tokens[: shorter.starts[last] + shorter.lengths[last]]
        return shorter

    def draw(self, rng: np.random.Generator, most: int) -> Tokens:
        """A window of at most `most` tokens of one document; longer documents are drawn more often."""
        index = int(np.searchsorted(self.weights, rng.integers(self.weights[-1]), side="right"))
        length = min(most, int(self.lengths[index]))
        start = int(self.starts[index]) + int(rng.integers(self.lengths[index] - length + 1))
        return self.tokens[start : start + length]

    def pair(self, rng: np.random.Generator, most: int) -> Pair:
        """Two segments, together of at most `most` tokens: neighbours, or as often not."""
        if rng.random() < SHORT:
            most = int(rng.integers(LEAST, most + 1))
        window = self.draw(rng, most)
        first, second = np.split(window, [len(window) // 2])
        random = bool(rng.random() < 0.5)
        return Pair(first, self.draw(rng, len(second)) if random else second, random)


@dataclass(frozen=True)
class Text(corpus.Tokenized):
    """A corpus of documents for BERT."""

    digest: str
    train: Documents
    validation: Documents

    @cached_property
    def marks(self) -> tuple[int, int, int]:
        """The numbers of [CLS], [SEP] and [MASK]."""
        first, last, mask = (
            corpus.special_token(self.tokenizer, token) for token in ("[CLS]", corpus.SEPARATOR, corpus.MASK)
        )
        return first, last, mask

    def batch(self, pairs: Sequence[Pair], rng: np.random.Generator) -> Batch:
        """The pairs, packed; of each a share of the words is masked, drawn from `rng`."""
        start, end, mask = self.marks
        words, types, masked, hidden, position = [], [], [], [], 0
        for pair in pairs:
            tokens = np.concatenate([[start], pair.first, [end], pair.second, [end]])
            places = np.delete(np.arange(1, len(tokens) - 1), len(pair.first))
            chosen = np.sort(rng.choice(places, max(1, round(MASKED * len(places))), replace=False))
            hidden.append(tokens[chosen].copy())
            # Four of five words become [MASK], of the rest one in two another word: fine-tuning knows no [MASK].
            fate = rng.random(len(chosen))
            other = rng.integers(len(corpus.BERT_TOKENS), self.tokenizer.get_vocab_size(), len(chosen))
            tokens[chosen] = np.where(fate < 0.8, mask, np.where(fate < 0.9, other, tokens[chosen]))
            words.append(tokens)
            types.append(np.repeat([0, 1], [len(pair.first) + 2, len(pair.second) + 1]))
            masked.append(chosen + position)
            position += len(tokens)
        packed, bounds = pack([row.tolist() for row in words])
        kinds, rows, targets = (torch.from_numpy(np.concatenate(parts)) for parts in (types, masked, hidden))
        follows = torch.tensor([int(pair.random) for pair in pairs])
        weights = {"mlm": len(rows), "nsp": len(pairs)}
        return Batch((packed, kinds, bounds, rows, targets, follows), weights, len(packed))


@dataclass(frozen=True)
class PreTraining:
    """The program."""

    name: str = "bert"
    command: str = "train bert"
    title: str = "BERT"
    input: str = "text"
    unit: str = "nats: masked words + next segment"
    counted: str = "tokens"
    options: Mapping[str, str | None] = field(default_factory=dict)
    defaults: Mapping[str, str] = field(default_factory=dict)

    @property
    def configs(self) -> Mapping[str, bert.BERTConfig]:
        return bert.CONFIGS

    @property
    def recipes(self) -> Mapping[str, Recipe]:
        return RECIPES

    def data(self, settings: Settings, config: bert.BERTConfig, source: Path | None = None) -> Text:
        """The text, split; as in `Program`."""
        documents = corpus.read_files(settings.data) if settings.data else corpus.standard_library_prose()
        tokenizer = checkpoint.load_tokenizer(source, config) if source else None
        text = corpus.load_corpus(documents, config.vocab_size, tokenizer, corpus.SEPARATOR)
        separator = corpus.special_token(text.tokenizer, corpus.SEPARATOR)
        parts = [Documents(tokens, separator) for tokens in (text.train, text.validation)]
        for part, name in zip(parts, ("training", "validation"), strict=True):
            if part.lengths.sum() < config.max_position_embeddings:
                raise UserError(
                    f"text: expected at least {config.max_position_embeddings} tokens for {name}, but got "
                    f"{part.lengths.sum()} (validation takes a tenth); give more text with --data"
                )
        if settings.max_samples is not None:
            parts[0] = parts[0].first(settings.max_samples * config.max_position_embeddings)
        return Text(text.tokenizer, text.digest, *parts)

    def fit(self, settings: Settings, config: bert.BERTConfig, data: Text) -> tuple[Settings, bert.BERTConfig]:
        """As in `Program`: nothing does."""
        return settings, config

    def model(self, config: bert.BERTConfig, ops: ModuleType) -> bert.BERTForPreTraining:
        """As in `Program`."""
        return bert.BERTForPreTraining(config, ops)

    def batches(self, data: Text, settings: Settings, config: bert.BERTConfig, step: int, parts: int) -> list[Batch]:
        """Pairs and masks, drawn anew for each step."""
        rng, size = np.random.default_rng((settings.seed, step)), settings.batch_size
        pairs = [
            data.train.pair(rng, _most(config)) for _ in range(size)
        ]  # before any mask: in how many parts is no matter
        return [data.batch(pairs[i : i + size // parts], rng) for i in range(0, size, size // parts)]

    def validation(self, data: Text, settings: Settings, config: bert.BERTConfig) -> list[Batch]:
        """Pairs of the validation text, with the same masks every time."""
        size = max(1, settings.batch_size // settings.accumulate)
        parts = max(1, VALIDATION_PAIRS // size)
        rng = np.random.default_rng((0, 0))
        return [data.batch([data.validation.pair(rng, _most(config)) for _ in range(size)], rng) for _ in range(parts)]

    def losses(self, model: bert.BERTForPreTraining, *tensors: Tensor) -> dict[str, Tensor]:
        """Of masked words and of the next segment."""
        return model.losses(*tensors)

    def read_config(self, values: dict[str, Any]) -> bert.BERTConfig:
        """As in `Program`."""
        return bert.BERTConfig.from_hugging_face(values)

    def write_config(self, config: bert.BERTConfig, data: Text) -> dict[str, Any]:
        """As in `Program`."""
        return {**config.to_hugging_face(), "architectures": ["BertForPreTraining"]}

    def describe(self, data: Text, settings: Settings, config: bert.BERTConfig) -> tuple[str, str]:
        """As in `Program`."""
        source = f"{len(settings.data)} files" if settings.data else "English in the Python standard library"
        sizes = " and ".join(f"{part.lengths.sum():,}" for part in (data.train, data.validation))
        each = f"{settings.batch_size} pairs of up to {config.max_position_embeddings} tokens"
        return f"text: {source}, {sizes} tokens for training and validation", each

    def baselines(self, data: Text, validation: Sequence[Batch]) -> dict[str, float]:
        """What the words' frequencies and a coin reach."""
        return {"word frequencies and a coin": _unigram(validation)[0] + math.log(2)}

    def show(self, outcome: Outcome, found: Findings) -> None:
        """Both losses and how often the model is right, beside what needs no network."""
        data, validation = outcome.data, outcome.validation
        nats, most = _unigram(validation)
        ours = _judge(outcome.model, validation, outcome.precision)
        simple = {"masked, nats": nats, "masked, right": most, "next, right": _overlap(data)}
        found.scores("the validation", {"BERT": ours}, {"word frequencies, shared words": simple})
        found.print(
            f'try it: torchweld fill-mask --checkpoint {outcome.out} "the name of the [MASK]", or '
            f"torchweld fine-tune classify --checkpoint {outcome.out} --data FILE"
        )


RECIPES = {
    "tiny": Recipe(steps=200, batch_size=16, learning_rate=2e-3, weight_decay=0.01),
    "small": Recipe(steps=1250, batch_size=32, learning_rate=2e-3, weight_decay=0.01),
    "medium": Recipe(steps=4000, batch_size=32, learning_rate=1e-3, weight_decay=0.01),
    "bert-base": Recipe(steps=10000, batch_size=256, learning_rate=1e-4, weight_decay=0.01, beta2=0.999, accumulate=8),
    "bert-large": Recipe(
        steps=10000, batch_size=256, learning_rate=1e-4, weight_decay=0.01, beta2=0.999, accumulate=32
    ),
}


def _most(config: bert.BERTConfig) -> int:
    """Tokens of a pair."""
    return config.max_position_embeddings - 3  # [CLS] and two [SEP]


def _unigram(batches: Sequence[Batch]) -> tuple[float, float]:
    """The entropy of the masked words' own frequencies, and the share of the most frequent one."""
    counts = torch.bincount(torch.cat([batch.tensors[4] for batch in batches])).double()
    p = counts[counts > 0] / counts.sum()
    return float(-(p * p.log()).sum()), float(p.max())


@torch.no_grad()
def _judge(model: bert.BERTForPreTraining, batches: Sequence[Batch], precision: Any) -> dict[str, float]:
    device = next(model.parameters()).device
    nats, right, follows, words, pairs = 0.0, 0, 0, 0, 0
    for batch in batches:
        tokens, types, bounds, rows, targets, random = (tensor.to(device) for tensor in batch.tensors)
        with precision:
            hidden = model.bert(tokens, types, bounds)
            said, second = model.words(hidden[rows]).float(), model.follows(model.bert.pooled(hidden, bounds))
        nats += float(torch.nn.functional.cross_entropy(said, targets, reduction="sum"))
        right += int((said.argmax(1) == targets).sum())
        follows += int((second.argmax(1) == random).sum())
        words, pairs = words + len(rows), pairs + len(random)
    return {"masked, nats": nats / words, "masked, right": right / words, "next, right": follows / pairs}


def _overlap(data: Text) -> float:
    """How often the words that two segments share tell whether they are neighbours: rare ones count more."""
    rng = np.random.default_rng(0)
    most = 61
    counts = np.bincount(data.train.tokens, minlength=data.tokenizer.get_vocab_size())
    weight = np.log(counts.sum() / (1.0 + counts))

    def measure(documents: Documents) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        pairs = [documents.pair(rng, most) for _ in range(OVERLAP_PAIRS)]
        shared = [
            weight[np.intersect1d(p.first, p.second)].sum() / weight[np.union1d(p.first, p.second)].sum() for p in pairs
        ]
        return np.array(shared), np.array([not pair.random for pair in pairs])

    values, near = measure(data.train)
    limits = np.sort(values)
    best = max(limits, key=lambda limit: float(((values >= limit) == near).mean()))
    values, near = measure(data.validation)
    return float(((values >= best) == near).mean())


BERT = PreTraining()
