"""A baseline without a network: the translation of the sentence that is most like the one asked for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

LONGEST = 3


def grams(text: str) -> Counter[str]:
    """The character n-grams of two to `LONGEST`, with the ends of the sentence."""
    text = f" {text.lower()} "
    return Counter(text[i : i + n] for n in range(2, LONGEST + 1) for i in range(len(text) - n + 1))


class TranslationMemory:
    """Sentences and their translations, found by the cosine of their n-grams, weighted by TF-IDF."""

    def __init__(self, sources: Sequence[str], targets: Sequence[str]) -> None:
        self.targets = targets
        counted = [grams(source) for source in sources]
        seen = Counter(gram for counts in counted for gram in counts)
        self.weights = {gram: math.log(1 + len(sources) / count) for gram, count in seen.items()}
        lists: dict[str, tuple[list[int], list[float]]] = {gram: ([], []) for gram in seen}
        for row, counts in enumerate(counted):
            weighted = {gram: count * self.weights[gram] for gram, count in counts.items()}
            norm = math.hypot(*weighted.values()) or 1.0
            for gram, weight in weighted.items():
                rows, values = lists[gram]
                rows.append(row)
                values.append(weight / norm)
        self.lists = {gram: (np.array(rows), np.array(values)) for gram, (rows, values) in lists.items()}

    def translate(self, texts: Sequence[str]) -> Iterator[str]:
        """What the nearest sentence was translated with; of equal ones the first."""
        for text in texts:
            likeness = np.zeros(len(self.targets))
            for gram, count in grams(text).items():
                if gram in self.lists:
                    rows, values = self.lists[gram]
                    likeness[rows] += count * self.weights[gram] * values
            yield self.targets[int(likeness.argmax())]
