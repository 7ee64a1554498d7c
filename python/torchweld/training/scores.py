"""How good predictions are, as tables: ours beside the baselines, the best one marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec

import torch
from rich.table import Table
from torch import Tensor

CLEAR = 0.5  # a number so far from zero has a sign
MOST_CONFUSED = 10
LOWER_IS_BETTER = {"squared error", "masked, nats"}


def of_numbers(outputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Pearson's r, the mean squared error, and how often the sign is right where it is clear: (N, 1) and (N)."""
    said, meant = outputs[:, 0].double(), targets.double()
    a, b = said - said.mean(), meant - meant.mean()
    scores = {
        "r": float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-30)),
        "squared error": float((said - meant).square().mean()),
    }
    clear = meant.abs() >= CLEAR
    if (meant[clear] > 0).any() and (meant[clear] < 0).any():
        scores[f"sign, beyond {CLEAR}"] = float((said[clear].sign() == meant[clear].sign()).double().mean())
    return scores


def of_labels(outputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Accuracy, and the mean of the labels' F1: (N, labels) and (N)."""
    said = outputs.argmax(1)
    each = []
    for label in targets.unique():
        hits = int(((said == label) & (targets == label)).sum())
        each.append(2 * hits / (int((said == label).sum()) + int((targets == label).sum())))
    return {"accuracy": float((said == targets).double().mean()), "mean F1": sum(each) / len(each)}


def of_translations(said: Sequence[str], meant: Sequence[str]) -> dict[str, float]:
    """chrF and BLEU in percent (sacrebleu's, where it is installed), and the share of exact matches."""
    exact = sum(a == b for a, b in zip(said, meant, strict=True)) / len(meant)
    if find_spec("sacrebleu") is None:
        return {"exact": exact}
    sacrebleu, references = import_module("sacrebleu"), [list(meant)]
    chrf, bleu = sacrebleu.corpus_chrf(list(said), references), sacrebleu.corpus_bleu(list(said), references)
    return {"chrF": float(chrf.score), "BLEU": float(bleu.score), "exact": exact}


def table(ours: Mapping[str, Mapping[str, float]], others: Mapping[str, Mapping[str, float]]) -> Table:
    """A row for each; the best of a column has a star."""
    rows = {**ours, **others}
    names = list(next(iter(rows.values())))
    shown = Table("")
    for name in names:
        shown.add_column(name, justify="right")
    best = {name: (min if name in LOWER_IS_BETTER else max)(scores[name] for scores in rows.values()) for name in names}
    for who, scores in rows.items():
        shown.add_row(who, *(f"{scores[name]:.3f}{'*' if scores[name] == best[name] else ' '}" for name in names))
    return shown


def confusion(said: Tensor, meant: Tensor, labels: Sequence[str]) -> Table:
    """How often each label was taken for each."""
    count = len(labels)
    counts = torch.bincount(meant * count + said, minlength=count * count).view(count, count)
    shown = Table("labelled / predicted", *labels, title="what was taken for what")
    for label, row in zip(labels, counts.tolist(), strict=True):
        shown.add_row(label, *map(str, row))
    return shown
