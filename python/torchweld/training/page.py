"""The page of a run: losses, speed, memory, configuration, and what the program has to show."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

import torchweld
from torchweld.environment import device_name, versions
from torchweld.pages import page
from torchweld.pages.charts import Axis, Series, chart, thinned
from torchweld.pages.page import Page
from torchweld.pages.tables import Cell, Column, Row, table
from torchweld.training.findings import Findings
from torchweld.training.program import Program
from torchweld.training.report import spread
from torchweld.training.settings import Settings
from torchweld.training.trainer import Trainer


def write(
    path: Path,
    program: Program,
    settings: Settings,
    trainers: Sequence[Trainer],
    baselines: Mapping[str, float],
    loss: float,
    found: Findings,
) -> Path:
    """Writes it. `loss`: of the validation, of the weights that are shown.

    Raises:
        UserError: the file cannot be written.
    """
    ours = trainers[0]
    made = Page(
        f"{program.title} on torchweld",
        f"{settings.config}, {ours.step:,} steps; a run of torchweld train.",
        f"Made by torchweld {torchweld.__version__}.",
    )
    made.add("Summary", _summary(program, ours, baselines, loss))
    made.add("Results", *found.parts)
    made.add("Losses", page.beside(_losses(program, trainers, baselines)))
    made.add("Speed", _speeds(program, trainers), page.beside(_rates(program, trainers)))
    made.add("Memory", page.pairs(_memory(ours)))
    made.add("Configuration", page.heading("Run"), page.pairs({**found.settings, **_named(asdict(settings))}))
    made.add("Configuration", page.heading("Model"), page.pairs(_model(ours.model)))
    made.add("Configuration", page.heading("Machine and versions"), page.pairs(_machine(ours)))
    return made.write(path)


def _summary(program: Program, ours: Trainer, baselines: Mapping[str, float], loss: float) -> str:
    values = {"validation loss": f"{loss:.4f}"}
    values |= {f"to beat: {name}": f"{value:.4f}" for name, value in baselines.items()}
    if ours.rates:
        values[f"{program.counted} a second"] = f"{median(ours.rates):,.0f}"
        values["time in steps"] = _duration(sum(ours.seconds))
    values["parameters"] = f"{sum(p.numel() for p in ours.model.parameters()):,}"
    return page.tiles(values) + page.text(f"Losses are in {program.unit}.", "quiet")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _losses(program: Program, trainers: Sequence[Trainer], baselines: Mapping[str, float]) -> str:
    series = []
    for i, trainer in enumerate(trainers):
        steps = [(float(step), loss) for step, loss in enumerate(trainer.losses, 1)]
        series.append(Series(f"training, {trainer.name}", thinned(steps), faint=True, colour=2 * i, dash=i))
        validation = [(float(step), loss) for step, loss in trainer.validation]
        series.append(Series(f"validation, {trainer.name}", validation, colour=2 * i + 1, dash=i))
    lead = f"Losses, {program.unit}. Horizontal lines are what needs no model."
    return chart("Losses by step", Axis("step"), Axis("loss"), series, baselines, lead)


def _rates(program: Program, trainers: Sequence[Trainer]) -> str:
    series = []
    for i, trainer in enumerate(trainers):
        first = trainer.step - len(trainer.rates) + 1  # the steps before were another process's
        points = thinned([(float(step), rate) for step, rate in enumerate(trainer.rates, first)])
        series.append(Series(trainer.name, points, colour=i, dash=i))
    name = f"{program.counted} a second"
    return chart("Speed by step", Axis("step"), Axis(name), series, lead=f"{name[0].upper()}{name[1:]}, step by step.")


def _speeds(program: Program, trainers: Sequence[Trainer]) -> str:
    columns = [Column("")]
    columns += [Column(n, number=True) for n in (f"median {program.counted}/s", "20% of the steps", "80%", "steps")]
    rows = []
    for i, trainer in enumerate(trainers):
        if trainer.rates:
            numbers = [median(trainer.rates), *spread(trainer.rates), len(trainer.rates)]
            rows.append(Row([trainer.name, *(Cell(f"{x:,.0f}", x) for x in numbers)], "ours" if i == 0 else ""))
    return table("Speed", columns, rows) if rows else ""


def _memory(ours: Trainer) -> dict[str, str]:
    """The largest use of memory: of this process, and of the GPU where there is one."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes there, kilobytes elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    found = {"largest use of the process": f"{peak / 2**20:,.0f} MB"}
    if ours.device.type == "cuda":
        found["largest use of the GPU"] = f"{torch.cuda.max_memory_allocated(ours.device) / 2**20:,.0f} MB"
    weights = sum(p.numel() * p.element_size() for p in ours.model.parameters())
    return {**found, "of it weights": f"{weights / 2**20:,.1f} MB"}


def _named(values: Mapping[str, Any]) -> dict[str, str]:
    """What was chosen, with names as people write them."""
    found = {**values, **values.get("options", {})}
    shown = {n: v for n, v in found.items() if n != "options" and v not in (None, "", ())}
    return {n.replace("_", " "): " ".join(v) if isinstance(v, list) else str(v) for n, v in shown.items()}


def _model(model: Any) -> dict[str, str]:
    config = model.config
    return _named(asdict(config) if is_dataclass(config) and not isinstance(config, type) else vars(config))


def _machine(ours: Trainer) -> dict[str, str]:
    kind = ours.device.type
    return {kind: device_name(kind), "dtype": str(ours.dtype).removeprefix("torch.")} | _named(versions())
