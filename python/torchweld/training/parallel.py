"""Pairs as a model takes them: tokens, and batches of pairs of like lengths, filled up to a number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from torchweld.errors import UserError
from torchweld.models.seq2seq import Seq2SeqConfig
from torchweld.training.cleaning import Dropped, clean, split
from torchweld.training.corpus import (
    CLOSE,
    Tokenized,
    load_tokens,
    special_token,
    train_joint_tokenizer,
    with_marks_as_text,
)
from torchweld.training.packing import pack
from torchweld.training.pairs import Pair
from torchweld.training.program import Batch

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """Training, validation or test.

    Attributes:
        sources, targets: the tokens of each pair, closed by </s>.
        start: the decoder's first input.
    """

    pairs: list[Pair]
    sources: list[list[int]]
    targets: list[list[int]]
    start: int

    def __len__(self) -> int:
        return len(self.pairs)

    def first(self, most: int | None) -> Part:
        """The first `most` of them."""
        return Part(self.pairs[:most], self.sources[:most], self.targets[:most], self.start)

    @cached_property
    def lengths(self) -> tuple[Indices, Indices]:
        """Of sources and of targets."""
        sources, targets = (np.array([len(tokens) for tokens in side]) for side in (self.sources, self.targets))
        return sources, targets

    @property
    def tokens(self) -> int:
        """Of both sides."""
        return int(sum(side.sum() for side in self.lengths))

    def batch(self, indices: Sequence[int]) -> Batch:
        """The pairs `indices`, packed: the arguments of `Seq2Seq.loss`."""
        source, source_bounds = pack([self.sources[i] for i in indices])
        targets, bounds = pack([self.targets[i] for i in indices])
        inputs = targets.roll(1)
        inputs[bounds[:-1].long()] = self.start
        tensors = (source, source_bounds, inputs, bounds, targets)
        return Batch(tensors, {"loss": len(targets)}, len(source) + len(targets))

    def lots(self, budget: int, rng: np.random.Generator | None = None) -> list[Indices]:
        """All pairs by length, cut where a lot reaches `budget` tokens; with `rng` pairs of equal lengths are mixed.

        How many lots there are, and how long, depends on the budget alone.
        """
        sources, targets = self.lengths
        mixed = np.arange(len(self)) if rng is None else rng.permutation(len(self))
        order = np.lexsort((mixed, targets, sources))
        cuts, total = [], 0
        for place, tokens in enumerate((sources + targets)[order].tolist()):
            total += tokens
            if total >= budget:
                cuts.append(place + 1)
                total = 0
        if 2 * total < budget:  # what is left goes with the last lot
            cuts = cuts[:-1]
        return np.split(order, cuts)


class Schedule:
    """The lots of the training pairs in the order of an epoch; a lot is a function of seed and step alone."""

    def __init__(self, part: Part, budget: int, seed: int) -> None:
        self.part, self.budget, self.seed = part, budget, seed
        self.epoch, self.lots = -1, part.lots(budget)

    def check(self, parts: int) -> None:
        """Raises UserError unless each of `parts` equal parts of any batch has a pair."""
        if (least := min(map(len, self.lots))) < parts:
            raise UserError(
                f"--batch-size: expected tokens of at least a pair for each of {parts} parts, but {self.budget} tokens "
                f"are {least} of the longest pairs; raise it, or lower --accumulate or the number of processes"
            )

    def lot(self, step: int) -> Indices:
        """Of step 0, 1, ..."""
        epoch, index = divmod(step, len(self.lots))
        if epoch != self.epoch:
            rng = np.random.default_rng((self.seed, epoch))
            lots = self.part.lots(self.budget, rng)
            self.epoch, self.lots = epoch, [lots[i] for i in rng.permutation(len(lots))]
        return self.lots[index]


@dataclass(frozen=True)
class Parallel(Tokenized):
    """Pairs of sentences.

    Attributes:
        dropped: what was left out, by rule.
        schedules: of the training pairs, by budget and seed.
    """

    digest: str
    dropped: str
    training: Part
    validation: Part
    test: Part
    schedules: dict[tuple[int, int], Schedule] = field(default_factory=dict)

    def schedule(self, budget: int, seed: int) -> Schedule:
        """The order of the training pairs."""
        if (budget, seed) not in self.schedules:
            self.schedules[budget, seed] = Schedule(self.training, budget, seed)
        return self.schedules[budget, seed]


def load(pairs: Sequence[Pair], config: Seq2SeqConfig, tokenizer: Tokenizer | None) -> Parallel:
    """Cleans, splits and encodes the pairs, with a tokenizer learned from those for training unless one is given.

    A sentence has at most a quarter of the model's positions in words, and no more tokens than positions.
    """
    dropped, positions = Dropped(), config.max_position_embeddings
    parts = split(clean(pairs, positions // 4, dropped), dropped)
    texts = [[text for pair in part for text in pair[:2]] for part in parts]
    tokenizer, digest, tokens = load_tokens(
        [text for part in texts for text in part],
        config.vocab_size,
        tokenizer and with_marks_as_text(tokenizer),
        CLOSE,
        lambda: train_joint_tokenizer(texts[0], config.vocab_size),
    )
    sentences = iter(_sentences(tokens, special_token(tokenizer, CLOSE)))
    encoded: list[Part] = []
    for part in parts:
        rows = [(pair, next(sentences), next(sentences)) for pair in part]
        short = [row for row in rows if max(len(row[1]), len(row[2])) <= positions]
        dropped.take(f"of more than {positions} tokens", len(rows) - len(short))
        if not short:
            raise UserError(f"--data: expected sentences of at most {positions} tokens, but got longer ones alone")
        kept, sources, targets = (list(column) for column in zip(*short, strict=True))
        encoded.append(Part(kept, sources, targets, config.decoder_start_token_id))
    training, validation, test = encoded
    return Parallel(tokenizer, digest, str(dropped), training, validation, test)


def _sentences(tokens: Tensor, end: int) -> list[list[int]]:
    """Cuts behind each `end`."""
    cuts = (tokens == end).nonzero()[:, 0] + 1
    return [sentence.tolist() for sentence in torch.tensor_split(tokens, cuts)[:-1]]
