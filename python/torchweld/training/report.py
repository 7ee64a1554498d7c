"""What a training run shows: progress, a comparison, and the loss curves."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from torchweld.errors import UserError
from torchweld.training.findings import Findings
from torchweld.training.program import Program
from torchweld.training.trainer import Trainer

_RECENT = 20
_NAMED = 20  # labels that a picture has room for
# Exact implementations differ by rounding, and training multiplies it: stock PyTorch beside itself, from weights that
# differ by 1e-7, is 5% off at single steps after two hundred, and 0.6% in the mean of twenty; after a warm-up of twelve
# steps it can be 1% off at once. So steps of the warm-up are held to rounding, and the others to their means.
EARLY_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
MEAN_LIMIT = 0.03


class Reporter:
    """Prints lines, with a live bar below them on a terminal and a line every `every` steps elsewhere."""

    def __init__(self, console: Console, done: int, total: int, program: Program) -> None:
        self.program = program
        self.console, self.total, self.every = console, total, max(1, round(total / 20))
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", total=total, completed=done)

    def __enter__(self) -> Reporter:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def step(self, trainers: Sequence[Trainer]) -> None:
        """After a step of every trainer."""
        losses, named = trainers[0].losses, trainers[0].named
        text = f"loss {fmean(losses[-_RECENT:]):.3f}"
        if len(named) > 1:
            text += f" (now {', '.join(f'{name} {loss:.3f}' for name, loss in named.items())})"
        for trainer in trainers:
            text += f", {median(trainer.rates[-_RECENT:]):,.0f} {self.program.counted}/s"
            text += f" ({trainer.name})" if len(trainers) > 1 else ""
        self.bar.update(self.task, completed=len(losses), description=text)
        if not self.console.is_terminal and len(losses) % self.every == 0:
            self.console.print(f"step {len(losses)}/{self.total}: {text}")

    def validation(self, trainers: Sequence[Trainer]) -> None:
        """After a validation of every trainer."""
        for trainer in trainers:
            step, loss = trainer.validation[-1]
            name = f" ({trainer.name})" if len(trainers) > 1 else ""
            exponential = f", perplexity {perplexity(loss)}" if self.program.unit == "nats per token" else ""
            self.console.print(f"step {step}/{self.total}: validation loss {loss:.4f}{exponential}{name}")


def perplexity(loss: float) -> str:
    """exp(loss), short."""
    return f"{math.exp(loss):.1f}" if loss < 50 else "inf"


def compare(found: Findings, trainers: Sequence[Trainer]) -> bool:
    """Shows the speed of ours and of its rivals after the same steps, and how far their losses differ.

    Returns:
        Whether all agree.
    """
    ours, *rivals = trainers
    count, counted = round(fmean(ours.counts)), ours.program.counted
    table = Table(title=f"{ours.step} steps of {count:,} {counted} each, from the same weights in the same order")
    for heading in ("", f"median {counted}/s", "20% .. 80%", "training loss", "validation loss"):
        table.add_column(heading, justify="right")
    for trainer in trainers:
        slow, fast = spread(trainer.rates)
        validation = f"{trainer.validation[-1][1]:.4f}" if trainer.validation else "-"
        rate = f"{median(trainer.rates):,.0f}"
        table.add_row(trainer.name, rate, f"{slow:,.0f} .. {fast:,.0f}", f"{trainer.losses[-1]:.4f}", validation)
    found.print(table)
    for rival in rivals:
        # A step's two times are neighbours, so what else the machine does hits both: the ratio is steadier than either.
        ratios = [b / a for a, b in zip(ours.seconds, rival.seconds, strict=True)]
        low, high = spread(ratios)
        most = f"20% .. 80% of the steps: {low:.2f} .. {high:.2f}"
        found.print(f"speed: torchweld / {rival.name} = {median(ratios):.2f} ({most})")
    verdicts = [_agree(found, ours, rival) for rival in rivals]
    return all(verdicts)


def _agree(found: Findings, ours: Trainer, rival: Trainer) -> bool:
    first = min(_RECENT, ours.settings.warm_up)
    early = _difference(ours.losses[:first], rival.losses[:first])
    means = _difference(_means(ours.losses), _means(rival.losses))
    limit = f"limit {EARLY_LIMIT[ours.dtype]:g}"
    agree = early <= EARLY_LIMIT[ours.dtype] and means <= MEAN_LIMIT
    if getattr(ours.model.config, "dropout", 0.0):  # fused attention draws other masks than torch's
        limit, agree = "no limit, since dropout draws other masks", means <= MEAN_LIMIT
    found.print(
        f"loss curves of torchweld and {rival.name}: they {'agree' if agree else 'DIFFER'}; largest relative "
        f"difference {early:.1e} in the first {first} steps ({limit}), "
        f"{_difference(ours.losses, rival.losses):.1e} in all, {means:.1e} between means of {_RECENT} steps "
        f"(limit {MEAN_LIMIT:g})"
    )
    return agree


def _difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def _means(losses: Sequence[float]) -> list[float]:
    return [fmean(losses[start : start + _RECENT]) for start in range(0, len(losses), _RECENT)]


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The 20th and the 80th percentile."""
    if len(values) < 2:
        return values[0], values[0]
    fifths = quantiles(values, n=5, method="inclusive")
    return fifths[0], fifths[-1]


def plot(path: Path, program: Program, trainers: Sequence[Trainer], baselines: Mapping[str, float]) -> bool:
    """Draws losses and baselines into a PNG; False where matplotlib, an optional extra, is not installed."""
    if find_spec("matplotlib") is None:
        return False
    figure = import_module("matplotlib.figure").Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel=f"loss ({program.unit})", title=f"{program.title} on torchweld")
    for trainer, style in zip(trainers, ("-", "--", ":"), strict=False):
        steps = range(1, trainer.step + 1)
        axes.plot(steps, trainer.losses, style, linewidth=0.8, alpha=0.6, label=f"training, {trainer.name}")
        if trainer.validation:
            axes.plot(*zip(*trainer.validation, strict=True), style, marker="o", label=f"validation, {trainer.name}")
    for (name, loss), style in zip(baselines.items(), (":", "-.", "--"), strict=False):
        axes.axhline(loss, color="grey", linestyle=style, label=name)
    axes.legend()
    _save(figure, path)
    return True


def plot_confusion(path: Path, counts: Tensor, labels: Sequence[str]) -> bool:
    """Draws how often each label was taken for each, (meant, said), into a PNG; False without matplotlib."""
    if find_spec("matplotlib") is None:
        return False
    shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
    figure = import_module("matplotlib.figure").Figure(figsize=(7, 6.5), layout="constrained")
    axes = figure.add_subplot(xlabel="predicted", ylabel="labelled", title="share of each label's images")
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    if len(labels) <= _NAMED:
        axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
        axes.set_yticks(range(len(labels)), labels)
        for (i, j), share in zip(product(range(len(labels)), repeat=2), shares.flatten().tolist(), strict=True):
            axes.text(j, i, f"{share:.2f}", ha="center", va="center", color="white" if share > 0.5 else "black")
    _save(figure, path)
    return True


def _save(figure: Any, path: Path) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(aside, format="png", dpi=120)
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"{path}: expected a file that can be written, but got: {error.strerror}") from None
