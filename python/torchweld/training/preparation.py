"""Texts on their way through the steps of `torchweld prepare`, and what each step did."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torchweld.errors import UserError
from torchweld.training.cleaning import Dropped

SHOWN = 60  # characters of an example


@dataclass(frozen=True)
class Item:
    """A text, or a sentence and its translation.

    Attributes:
        texts: one or two.
        label: what is said of it, if anything.
        group: of pairs that stay together.
        tokens: of each of the texts.
    """

    texts: tuple[str, ...]
    label: str = ""
    group: str = ""
    tokens: tuple[list[Any], ...] = ()


@dataclass(frozen=True)
class Step:
    """What a step did. before, after: how many texts there were and are; example: one that it changed or dropped."""

    step: str
    before: int
    after: int
    what: str
    example: str


@dataclass
class Preparation:
    """The items, by the part that they belong to, and the steps so far."""

    parts: dict[str, list[Item]]
    steps: list[Step] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(map(len, self.parts.values()))

    def __iter__(self) -> Iterator[Item]:
        return (item for items in self.parts.values() for item in items)

    @property
    def learned_from(self) -> list[str]:
        """The texts of the part for training, or all."""
        return [text for item in next(iter(self.parts.values())) for text in item.texts]

    def change(self, name: str, made: Callable[[Item], Item]) -> None:
        """A step that changes the texts."""
        count, example = 0, ""
        for part, items in self.parts.items():
            after = [made(item) for item in items]
            for old, new in zip(items, after, strict=True):
                if old.texts != new.texts:
                    count += 1
                    example = example or f"{shown(old)} -> {shown(new)}"
            self.parts[part] = after
        self.steps.append(Step(name, len(self), len(self), f"{count:,} changed", example))

    def drop(self, name: str, reason: Callable[[Item], str | None]) -> None:
        """A step that drops the items for which there is a reason.

        Raises:
            UserError: nothing is left of a part.
        """
        before, reasons = len(self), Dropped()
        for part, items in self.parts.items():
            kept = []
            for item in items:
                if why := reason(item):
                    reasons.take(why, example=shown(item))
                else:
                    kept.append(item)
            self.parts[part] = kept
        self.done(name, before, f"dropped: {reasons}", next(iter(reasons.examples.values()), ""))

    def done(self, name: str, before: int, what: str, example: str) -> None:
        """Notes a step; refuses one that leaves nothing."""
        self.steps.append(Step(name, before, len(self), what, example))
        if empty := [part for part, items in self.parts.items() if not items]:
            raise UserError(
                f"--data: expected texts that are left after every step, but {name} left none"
                f"{f' for {empty[0]}' if empty[0] else ''} of {before:,} ({what}); give more texts, or ask for less"
            )


def shown(item: Item) -> str:
    """The texts, control characters escaped and the rest cut."""
    whole = " | ".join("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text) for text in item.texts)
    return whole if len(whole) <= SHOWN else whole[: SHOWN - 3] + "..."


def cut(text: str) -> str:
    """The beginning of a long one."""
    return text if len(text) <= 2 * SHOWN else text[: 2 * SHOWN - 3] + "..."
