"""A baseline that cannot read: the words of a context that stand nearest to those of the question, rare ones above all.

After the sliding window and the distances of Richardson et al., MCTest, EMNLP 2013.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from statistics import median_low

import numpy as np

from torchweld.training import scores
from torchweld.training.questions import Question

FADES = 0.85  # what a word counts at each word's distance
THRESHOLDS = 50
_WORD = re.compile(r"\w+")


class NearbyWords:
    """Learns which words are rare, how long answers are, and, where there are unanswerable questions, when to say "".

    Attributes:
        least: below this score the answer is "".
    """

    def __init__(self, training: Sequence[Question], validation: Sequence[Question]) -> None:
        contexts = dict.fromkeys(question.context for question in training)
        seen = Counter(word for context in contexts for word in set(_WORD.findall(context.lower())))
        self._rarity = {word: 1 + math.log((1 + len(contexts)) / (1 + count)) for word, count in seen.items()}
        self._rarest = 1 + math.log(1 + len(contexts))
        lengths = [len(_WORD.findall(question.answers[0].text)) for question in training if question.answers]
        self.length, self.least = max(1, median_low(lengths or [1])), -math.inf
        if not all(question.answers for question in training):
            self._learn_least(validation)

    def _learn_least(self, questions: Sequence[Question]) -> None:
        """The threshold of the highest F1."""
        scored, found = [], []
        for question in questions:
            text, score = self.best(question)
            scored.append(score)
            found.append((scores.best_overlap(text, question.right), scores.best_overlap("", question.right)))
        best = -1.0
        for least in [-math.inf, *np.quantile(scored, np.linspace(0, 1, THRESHOLDS)).tolist(), math.inf]:
            total = sum(pair[score < least] for pair, score in zip(found, scored, strict=True))
            if total > best:
                best, self.least = total, least

    def best(self, question: Question) -> tuple[str, float]:
        """The words that stand nearest to the question's, and their score."""
        places = list(_WORD.finditer(question.context))
        words = [place[0].lower() for place in places]
        if not words:
            return "", 0.0
        asked = set(_WORD.findall(question.text.lower()))
        near, own = np.zeros(len(words)), np.zeros(len(words))
        for word in asked.intersection(words):
            at, rarity = np.array([i for i, each in enumerate(words) if each == word]), self._weight(word)
            own[at] = rarity
            near += rarity * FADES ** np.abs(np.arange(len(words))[:, None] - at).min(1)
        length = min(self.length, len(words))
        # What the question says itself is no answer to it.
        each = np.convolve(near / length - near.max() * (own > 0), np.ones(length), mode="valid")
        first = int(each.argmax())
        return question.context[places[first].start() : places[first + length - 1].end()], float(each[first])

    def _weight(self, word: str) -> float:
        return self._rarity.get(word, self._rarest)

    def __call__(self, question: Question) -> str:
        """The answer; "" where it does not dare one."""
        text, score = self.best(question)
        return text if score >= self.least else ""
