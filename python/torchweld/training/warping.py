"""The nearest recording by dynamic time warping: how words were recognised before there were models of them.

Sakoe and Chiba, "Dynamic programming algorithm optimization for spoken word recognition", 1978: the symmetric form
without a slope constraint, over cepstra without their mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from torchweld.training.spectrogram import BANDS, DECIBELS

CEPSTRA = 12
EVERY = 2  # frames
Floats = NDArray[np.float64]


def cepstra(decibels: Floats) -> Floats:
    """(frames, CEPSTRA) of what can be heard in (FRAMES, BANDS): cosine transforms of the bands, without the level."""
    heard = np.flatnonzero((decibels > -DECIBELS).any(1))
    angles = np.outer(np.arange(BANDS) + 0.5, np.arange(1, CEPSTRA + 1)) * (np.pi / BANDS)
    found = decibels[heard[0] : heard[-1] + 1 : EVERY] @ np.cos(angles)
    return found - found.mean(0)


def distances(one: Floats, others: Sequence[Floats]) -> Floats:
    """Of one recording to each of the others: the least mean distance of frames along a way through both."""
    lengths = np.array([len(other) for other in others])
    longest = int(lengths.max())
    padded = np.zeros((longest, len(others), one.shape[1]))
    for i, other in enumerate(others):
        padded[: len(other), i] = other
    # sums[j]: of the best way from both beginnings to the frames i of one and j - 1 of the others.
    sums = np.full((longest + 1, len(others)), np.inf)
    sums[0] = 0.0
    for frame in one:
        costs = np.sqrt(np.square(padded - frame).sum(-1))
        after = np.full_like(sums, np.inf)
        for j in range(longest):
            cost, diagonal = costs[j], sums[j] + costs[j]  # a diagonal step counts twice, as two steps
            after[j + 1] = cost + np.minimum(np.minimum(sums[j + 1], after[j]), diagonal)
        sums = after
    return sums[lengths, np.arange(len(others))] / (len(one) + lengths)
