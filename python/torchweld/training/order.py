"""The order of examples: shuffled anew for each epoch, a function of seed and step alone."""

from __future__ import annotations

import numpy as np


def chosen(seed: int, count: int, step: int, size: int) -> list[int]:
    """The examples, out of `count`, of the batch of a step."""
    first = step * size
    epochs = range(first // count, (first + size - 1) // count + 1)
    orders = {epoch: np.random.default_rng((seed, epoch)).permutation(count) for epoch in epochs}
    return [int(orders[at // count][at % count]) for at in range(first, first + size)]
