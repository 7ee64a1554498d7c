"""The source of cases: sizes by regime, magnitudes, dtypes, options in pairs and triples, all by number."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Options = Mapping[str, Callable[[], dict[str, Any]]]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# Sizes around the edges of vectors (8 to 64 elements) and of tiles (64, 128, 256), and of many tiles.
FEW = (1, 1, 2, 3, 4, 5, 7, 8, 9)
VECTORS = (13, 15, 16, 17, 31, 32, 33, 47, 48)
TILES = (63, 64, 65, 67, 96, 127, 128, 129, 131)
MANY = (192, 255, 256, 257, 300, 383, 512, 513, 700)
LONG = (1009, 1024, 2048, 2049, 4099)

# The numbers by which an additive mask hides a key: usual ones, the least of each dtype, and ones that overflow.
HIDING = (-100.0, -1e4, -1e9, -1e30, -1e38, -65504.0, *(torch.finfo(d).min for d in FLOATS), float("-inf"))


class Draw:
    """The draws for case `number` of a `seed`."""

    def __init__(self, seed: int, number: int, op: str = "") -> None:
        self.number = number
        self._random = random.Random(f"{seed} {number} {op}")

    def one(self, *choices: T) -> T:
        return self._random.choice(choices)

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def seed(self) -> int:
        return self._random.randrange(1 << 20)

    def size(self, *regimes: tuple[int, ...], empty: float = 0.02) -> int:
        """A size of one of the regimes, or 0 with the probability `empty`."""
        return 0 if self.chance(empty) else self.one(*self.one(*regimes))

    def some(self, things: list[T]) -> list[T]:
        """One to three of the choices, in their order."""
        chosen = self._random.sample(range(len(things)), min(len(things), self._random.randint(1, 3)))
        return [things[i] for i in sorted(chosen)]

    def options(self, pool: Options) -> dict[str, Any]:
        """Fields from options of the pool: each pair in turn for even numbers, three or more options for odd ones."""
        pairs = list(itertools.combinations(pool, 2))
        if self.number % 2 == 0:
            chosen: tuple[str, ...] = pairs[self.number // 2 % len(pairs)]
        else:
            chosen = tuple(self._random.sample(list(pool), min(len(pool), self._random.choice((3, 3, 4, 6)))))
        fields: dict[str, Any] = {}
        for name in chosen:
            fields |= pool[name]()
        return fields
