"""Which pairs are learned from and which are tested: rules, counted, and a split in which no test sentence was seen."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence

from torchweld.errors import UserError
from torchweld.training.pairs import Pair

TEST, VALIDATION = 8, 4  # of a hundred
RATIO, SLACK = 2.0, 12  # a translation is at most so many times as long, and so many characters more
LEAST = 100


class Dropped(dict[str, int]):
    """How many pairs each rule took. `examples`: the first that each took, where it is known."""

    def __init__(self) -> None:
        super().__init__()
        self.examples: dict[str, str] = {}

    def take(self, rule: str, count: int = 1, example: str = "") -> None:
        """Counts."""
        if count:
            self[rule] = self.get(rule, 0) + count
            self.examples.setdefault(rule, example)

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {rule}" for rule, count in self.items()) or "nothing"


def _rule(pair: Pair, most_words: int) -> str | None:
    """Why a pair is left out."""
    source, target, _ = pair
    short, long = sorted((len(source), len(target)))
    if not source or not target:
        return "with an empty side"
    if source == target:
        return "not translated"
    if "://" in source or "://" in target:
        return "with a link"
    if max(len(source.split()), len(target.split())) > most_words:
        return f"of more than {most_words} words"
    if long > RATIO * short + SLACK:
        return "of unlike lengths"
    return None


def clean(pairs: Sequence[Pair], most_words: int, dropped: Dropped) -> list[Pair]:
    """The pairs that no rule takes, of composed characters (NFC)."""
    kept = []
    for source, target, group in pairs:
        pair = Pair(unicodedata.normalize("NFC", source), unicodedata.normalize("NFC", target), group)
        if rule := _rule(pair, most_words):
            dropped.take(rule, example=f"{pair.source} | {pair.target}")
        else:
            kept.append(pair)
    return kept


def split(pairs: Sequence[Pair], dropped: Dropped) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """Training, validation and test, each pair once; sources of the latter two that training has too are left out.

    A hash decides: of a pair's group, so that what belongs together stays together, else of its source.

    Raises:
        UserError: too few are left.
    """
    parts: tuple[dict[Pair, None], ...] = ({}, {}, {})
    for source, target, group in pairs:
        digest = hashlib.sha256((group or source).encode()).digest()
        share = int.from_bytes(digest[:8], "big") % 100
        part = parts[2 if share < TEST else 1 if share < TEST + VALIDATION else 0]
        part[Pair(source, target)] = None
    training, seen = [*parts[0]], {pair.source for pair in parts[0]}
    validation, test = ([pair for pair in part if pair.source not in seen] for part in parts[1:])
    distinct = sum(map(len, parts))
    dropped.take("twice", len(pairs) - distinct)
    dropped.take("held out but also in training", distinct - len(training) - len(validation) - len(test))
    if len(training) < LEAST or not validation or not test:
        sizes = " / ".join(f"{len(part):,}" for part in (training, validation, test))
        raise UserError(
            f"--data: expected at least {LEAST} pairs for training, and some for validation and test, but got {sizes}; "
            f"dropped: {dropped}; give more pairs"
        )
    return training, validation, test
