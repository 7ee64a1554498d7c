"""How well the next item of each user is ranked among all items, and rankings that need no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

TOP = 10
MOST_ITEMS = 10_000  # a baseline that compares each item with each keeps a matrix of them
NEIGHBOURS = 50
RECENT = 10  # items of a user whose neighbours are looked for
BACK = 0.5  # what the item before the last counts beside the last one

Histories = Sequence[Sequence[int]]


def of_ranks(ranks: Tensor) -> dict[str, float]:
    """HR@10, how often the item is among the first ten, and NDCG@10, which counts the place: ranks (N) from 0 on."""
    hit = ranks < TOP
    gain = torch.where(hit, 1 / torch.log2(ranks.double() + 2), 0.0)
    return {f"HR@{TOP}": float(hit.double().mean()), f"NDCG@{TOP}": float(gain.mean())}


def ranks(scores: Tensor, wanted: Tensor) -> Tensor:
    """How many items stand before the wanted one, ties by half: (N, items) and (N) -> (N)."""
    own = scores.gather(1, wanted[:, None])
    before, equal = (scores > own).sum(1), (scores == own).sum(1) - 1
    return before + (equal + 1) // 2


def popularity(training: Histories, items: int) -> Tensor:
    """How often each item was had: (items + 1), whose first is no item."""
    flat = torch.tensor([item for history in training for item in history])
    return torch.bincount(flat, minlength=items + 1).double()


def judge(scores: Tensor, before: Histories, wanted: Sequence[int]) -> dict[str, float]:
    """Of what follows each of `before`: scores (N, items + 1), and the items. What the user had stands behind all."""
    scores = scores.double().clone()
    for row, history in zip(scores, before, strict=True):
        row[list(history)] = -math.inf
    return of_ranks(ranks(scores[:, 1:], torch.tensor(wanted) - 1))


def baselines(training: Histories, before: Histories, wanted: Sequence[int], items: int) -> dict[str, dict[str, float]]:
    """The scores of each baseline: it learns from `training`, and ranks what follows each of `before`."""
    popular = popularity(training, items)
    found = {"popularity": popular.expand(len(before), -1)}
    if items <= MOST_ITEMS:
        found["item kNN"] = _neighbours(training, [history[-RECENT:] for history in before], items)
        found["Markov chain"] = _chain(training, before, popular / popular.sum())
    return {name: judge(said, before, wanted) for name, said in found.items()}


def _neighbours(training: Histories, before: Histories, items: int) -> Tensor:
    """The cosines of an item with what the user had, over who had both; each item counts its nearest ones alone."""

    def had(histories: Histories) -> Tensor:
        matrix = torch.zeros(len(histories), items + 1)
        for row, history in zip(matrix, histories, strict=True):
            row[list(history)] = 1.0
        return matrix

    users = had(training)
    users = users / users.norm(dim=0).clamp_min(1e-9)
    cosines = (users.t() @ users).fill_diagonal_(0.0)
    least = cosines.topk(min(NEIGHBOURS, items), dim=0).values[-1]
    return had(before) @ torch.where(cosines >= least, cosines, 0.0)


def _chain(training: Histories, before: Histories, popular: Tensor) -> Tensor:
    """How often an item came right after the last one, and two places after the one before; rarely, what is popular."""
    size = len(popular)
    after = []
    for distance in (1, 2):
        steps = torch.zeros(size, size)
        for history in training:
            ends = list(pairwise(history)) if distance == 1 else list(zip(history, history[2:], strict=False))
            for a, b in ends:
                steps[a, b] += 1
        after.append(steps / (steps.sum(1, keepdim=True) + 1))
    last, previous = (torch.tensor([history[-n] if len(history) >= n else 0 for history in before]) for n in (1, 2))
    return after[0][last] + BACK * after[1][previous] + 1e-2 * popular


def entropy(training: Histories, wanted: Tensor, items: int) -> float:
    """The mean cost of the wanted items by popularity alone, each counted once more, in nats."""
    counts = popularity(training, items)[1:] + 1
    return float(-(counts / counts.sum()).log()[wanted - 1].mean()) if len(wanted) else math.nan
