"""Questions and their contexts as sequences: [CLS] question [SEP] context [SEP]; and the best answer of what comes out.

A context that is too long is cut into windows that overlap. An answer that a window does not have whole is its [CLS].
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from torchweld.errors import UserError
from torchweld.models.bert import BERTConfig
from torchweld.training.corpus import SEPARATOR, special_token
from torchweld.training.packing import pack
from torchweld.training.program import Batch
from torchweld.training.questions import Question
from torchweld.training.tuning import Examples, outputs

LONGEST_WINDOW, STRIDE = 384, 128  # as the paper's authors fine-tune on SQuAD
LONGEST_QUESTION, LONGEST_ANSWER = 64, 30  # tokens
LEAST = 16
AT_ONCE = 1000  # a tokenizer's encoding of a text is far larger than its tokens


@dataclass(frozen=True)
class Cut:
    """How contexts are cut. `window`: the most tokens of a sequence; `stride`: how far the next window begins."""

    window: int
    stride: int

    @classmethod
    def of(cls, window: str | None, stride: str | None, config: BERTConfig) -> Cut:
        """From what was asked for; without that as usual.

        Raises:
            UserError: it does not fit the model, or cannot be.
        """
        most = config.max_position_embeddings
        size = int(window or min(LONGEST_WINDOW, most))
        if not LEAST <= size <= most:
            raise UserError(
                f"--window: expected {LEAST} to {most} tokens, the max_position_embeddings of the checkpoint, but got "
                f"{size}"
            )
        return cls(size, int(stride or STRIDE))


@dataclass(frozen=True)
class Encoded:
    """A context's tokens, and of each where it begins and ends among the characters: (n), (n, 2)."""

    tokens: NDArray[np.int64]
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, encoding: Any) -> Encoded:
        """From a tokenizer's."""
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        return cls(np.array(encoding.ids, dtype=np.int64), offsets)

    def covering(self, start: int, end: int) -> tuple[int, int]:
        """The first and the last token of the characters from `start` to before `end`."""
        first = int(np.searchsorted(self.offsets[:, 1], start, side="right"))
        first = min(first, len(self.tokens) - 1)
        return first, max(first, int(np.searchsorted(self.offsets[:, 0], end)) - 1)


@dataclass(frozen=True)
class Window:
    """Tokens `first` to before `last` of the context of question number `question`."""

    question: int
    first: int
    last: int


@dataclass(frozen=True)
class Found:
    """An answer: the characters `start` to before `end` of the context, or "" where it has none.

    Attributes:
        probability: that of its first token times that of its last one, in its window.
        margin: by how much the logits of the best answer exceed those of "there is none".
    """

    text: str
    start: int
    end: int
    probability: float
    margin: float


class Windows(Examples):
    """The sequences of questions. `ends`: (windows, 2), the first and the last token of the answer in each."""

    def __init__(self, questions: Sequence[Question], tokenizer: Tokenizer, cut: Cut) -> None:
        self.questions = questions
        self._start, self._close = (special_token(tokenizer, token) for token in ("[CLS]", SEPARATOR))
        texts = tokenizer.encode_batch_fast([question.text for question in questions], add_special_tokens=False)
        self.asked = [text.ids[: min(LONGEST_QUESTION, cut.window // 2)] for text in texts]
        known: dict[str, Encoded] = {}
        contexts = list(dict.fromkeys(question.context for question in questions))
        for start in range(0, len(contexts), AT_ONCE):
            some = contexts[start : start + AT_ONCE]
            encodings = tokenizer.encode_batch(some, add_special_tokens=False)
            known |= zip(some, (Encoded.of(encoding) for encoding in encodings), strict=True)
        self.contexts = [known[question.context] for question in questions]
        self.windows = [window for number in range(len(questions)) for window in self._windows(number, cut)]
        self.ends = torch.tensor([self._ends(window) for window in self.windows]).view(-1, 2)

    @cached_property
    def lengths(self) -> list[int]:
        """As in `Examples`."""
        return [len(self.asked[w.question]) + w.last - w.first + 3 for w in self.windows]

    def _windows(self, number: int, cut: Cut) -> Iterable[Window]:
        count, room = len(self.contexts[number].tokens), cut.window - len(self.asked[number]) - 3
        step = min(cut.stride, room)
        for first in range(0, max(1, count - room + step), step):
            yield Window(number, first, min(first + room, count))

    def _before(self, window: Window) -> int:
        """How many tokens stand before those of the context."""
        return len(self.asked[window.question]) + 2

    def _ends(self, window: Window) -> tuple[int, int]:
        question, context = self.questions[window.question], self.contexts[window.question]
        if question.answers and len(context.tokens):
            first, last = context.covering(question.answers[0].start, question.answers[0].end)
            if window.first <= first and last < window.last:
                shift = self._before(window) - window.first
                return first + shift, last + shift
        return 0, 0

    def batch(self, indices: Sequence[int]) -> Batch:
        """As in `Examples`."""
        sequences, segments = [], []
        for index in indices:
            window = self.windows[index]
            context = self.contexts[window.question].tokens[window.first : window.last].tolist()
            sequences.append([self._start, *self.asked[window.question], self._close, *context, self._close])
            segments.append([0] * self._before(window) + [1] * (len(context) + 1))
        tokens, bounds = pack(sequences)
        types, _ = pack(segments)
        return Batch((tokens, types, bounds, self.ends[list(indices)]), {"loss": len(indices)}, len(tokens))

    def answers(self, model: Any, size: int, precision: Any, unanswerable: bool) -> list[Found]:
        """The model's answer to each question, `size` windows at once; "" is one if some are `unanswerable`."""
        best: list[Found | None] = [None] * len(self.questions)
        none = [(math.inf, 0.0)] * len(self.questions)  # the least that speaks for "": logits, probability
        scores = [-math.inf] * len(self.questions)
        for window, logits in zip(self.windows, outputs(model, self, size, precision), strict=True):
            number, chances = window.question, logits.softmax(0)
            none[number] = min(none[number], (float(logits[0].sum()), float(chances[0].prod())))
            before = self._before(window)
            inside = slice(before, before + window.last - window.first)
            if window.last == window.first:
                continue
            score, first, last = best_span(logits[inside])
            if score > scores[number]:
                scores[number] = score
                offsets = self.contexts[number].offsets[window.first :]
                start, end = int(offsets[first, 0]), int(offsets[last, 1])
                probability = float(chances[before + first, 0] * chances[before + last, 1])
                best[number] = Found(self.questions[number].context[start:end], start, end, probability, 0.0)
        found = []
        for each, score, (least, probability) in zip(best, scores, none, strict=True):
            if each is None or (unanswerable and least > score):
                found.append(Found("", 0, 0, probability, score - least))
            else:
                found.append(Found(each.text, each.start, each.end, each.probability, score - least))
        return found


def best_span(logits: Tensor) -> tuple[float, int, int]:
    """The largest sum of the logits of a first and a last token, and the two: (n, 2), n > 0.

    The last one is not before the first, and at most `LONGEST_ANSWER` tokens are an answer.
    """
    starts, ends = logits.unbind(1)
    longest = min(LONGEST_ANSWER, len(starts))
    later = torch.cat([ends, ends.new_full((longest - 1,), -torch.inf)]).unfold(0, longest, 1)  # (n, longest)
    score, at = (starts[:, None] + later).flatten().max(0)
    first, more = divmod(int(at), longest)
    return float(score), first, first + more
