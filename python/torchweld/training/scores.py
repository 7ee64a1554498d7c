"""How good predictions are, as tables: ours beside the baselines, the best one marked."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec

import torch
from rich.table import Table
from torch import Tensor

CLEAR = 0.5  # a number so far from zero has a sign
MOST_CONFUSED = 10
SMALL = 0.05  # a column with a smaller number has four digits
Scored = Mapping[str, Mapping[str, float]]
LOWER_IS_BETTER = {"squared error", "masked, nats", "bits per number"}


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


def answer_words(text: str) -> list[str]:
    """What SQuAD compares of an answer: its words in lower case, without punctuation and articles."""
    plain = text.lower().translate(dict.fromkeys(map(ord, string.punctuation)))
    return re.sub(r"\b(?:a|an|the)\b", " ", plain).split()


def overlap(said: str, meant: str) -> float:
    """SQuAD's F1 of one answer: how many words both have; of an empty one whether both are."""
    ours, theirs = answer_words(said), answer_words(meant)
    if not (ours and theirs):
        return float(ours == theirs)
    return 2 * (Counter(ours) & Counter(theirs)).total() / (len(ours) + len(theirs))


def best_overlap(said: str, meant: Sequence[str]) -> float:
    """The F1 beside the best of several right answers; without one that has words, "" is right."""
    return max(overlap(said, each) for each in _with_words(meant))


def of_answers(said: Sequence[str], meant: Sequence[Sequence[str]]) -> dict[str, float]:
    """Exact match and F1 in percent, as SQuAD defines them, the best over the right answers of each question.

    A question without an answer has no right ones; where there are such questions, both kinds are shown too.
    """
    exact, shared = [], []
    for ours, theirs in zip(said, meant, strict=True):
        exact.append(any(answer_words(ours) == answer_words(each) for each in _with_words(theirs)))
        shared.append(best_overlap(ours, theirs))
    scores = {"exact match, %": _percent(exact), "F1, %": _percent(shared)}
    empty = [_with_words(theirs) == [""] for theirs in meant]
    if any(empty) and not all(empty):
        scores["F1 of the answerable, %"] = _percent([x for x, none in zip(shared, empty, strict=True) if not none])
        scores["unanswerable found, %"] = _percent([x for x, none in zip(shared, empty, strict=True) if none])
    return scores


def _with_words(meant: Sequence[str]) -> list[str]:
    return [each for each in meant if answer_words(each)] or [""]


def _percent(shares: Sequence[float]) -> float:
    return 100 * sum(shares) / len(shares)


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(kind, first word, word behind the last one) of each entity, by tags as B-kind, I-kind, E-kind, S-kind and O.

    As CoNLL's script reads them: without a B an entity begins where the kind changes.
    """
    found, begin, before = set(), 0, ("O", "")
    for i, tag in enumerate([*tags, "O"]):
        mark, _, kind = tag.partition("-")
        begins = kind != before[1] or mark in ("B", "S") or before[0] in ("E", "S")
        if before[1] and begins:
            found.add((before[1], begin, i))
        if begins:
            begin = i
        before = (mark, kind)
    return found


def has_entities(labels: Sequence[str]) -> bool:
    """Whether tags stand for entities, and not for words alone."""
    return "O" in labels and all(label == "O" or re.match(r"[BIES]-.", label) for label in labels)


def of_tags(said: Sequence[Sequence[str]], meant: Sequence[Sequence[str]], by_entity: bool) -> dict[str, float]:
    """The accuracy of the tags of sentences; `by_entity`: F1, precision and recall of whole entities too."""
    pairs = [pair for ours, theirs in zip(said, meant, strict=True) for pair in zip(ours, theirs, strict=True)]
    accuracy = {"accuracy of words": sum(a == b for a, b in pairs) / len(pairs)}
    return {**of_entities(said, meant), **accuracy} if by_entity else accuracy


def of_entities(
    said: Sequence[Sequence[str]], meant: Sequence[Sequence[str]], kind: str | None = None
) -> dict[str, float]:
    """F1, precision and recall of entities, whose kind and both ends are right; of one kind alone, or of all."""
    hits = found = wanted = 0
    for ours, theirs in zip(said, meant, strict=True):
        a, b = ({e for e in entities(tags) if kind in (None, e[0])} for tags in (ours, theirs))
        hits, found, wanted = hits + len(a & b), found + len(a), wanted + len(b)
    return {
        "F1 of entities": 2 * hits / max(1, found + wanted),
        "precision": hits / max(1, found),
        "recall": hits / max(1, wanted),
    }


def columns(rows: Scored) -> tuple[dict[str, int], dict[str, float]]:
    """Of each column of the first row: how many digits it has, and its best number."""
    digits, best = {}, {}
    for name in next(iter(rows.values())):
        column = [scores[name] for scores in rows.values() if name in scores]
        best[name] = (min if name in LOWER_IS_BETTER else max)(column)
        digits[name] = 4 if min(map(abs, column)) < SMALL else 3
    return digits, best


def table(ours: Scored, others: Scored) -> Table:
    """A row for each, with the columns of ours; the best of a column has a star. What was not measured is a dash."""
    rows = {**ours, **others}
    digits, best = columns(rows)
    shown = Table("")
    for name in digits:
        shown.add_column(name, justify="right")
    for who, scores in rows.items():
        cells = []
        for name in digits:
            mark = "*" if scores.get(name) == best[name] else " "
            cells.append(f"{scores[name]:.{digits[name]}f}{mark}" if name in scores else "- ")
        shown.add_row(who, *cells)
    return shown


def each_label(said: Tensor, meant: Tensor, labels: Sequence[str]) -> Table:
    """Precision, recall and F1 of each label."""
    found = counts(said, meant, len(labels)).double()
    hits, precise, recalled = found.diagonal(), found.sum(0).clamp_min(1), found.sum(1).clamp_min(1)
    columns = (hits / precise, hits / recalled, 2 * hits / (precise + recalled))
    shown = Table("", "precision", "recall", "F1", "of the test", title="classes one by one")
    for i, label in enumerate(labels):
        shown.add_row(label, *(f"{float(column[i]):.3f}" for column in columns), str(int(found[i].sum())))
    return shown


def counts(said: Tensor, meant: Tensor, labels: int) -> Tensor:
    """How often each label was taken for each: (labels meant, labels said)."""
    return torch.bincount(meant * labels + said, minlength=labels * labels).view(labels, labels)


def confusion(said: Tensor, meant: Tensor, labels: Sequence[str]) -> Table:
    """How often each label was taken for each."""
    numbers = [str(i) for i in range(len(labels))]  # ten names have no room side by side
    shown = Table("labelled / predicted", *numbers, title="what was taken for what")
    for i, row in enumerate(counts(said, meant, len(labels)).tolist()):
        shown.add_row(f"{i} {labels[i]}", *map(str, row))
    return shown
