"""Charts as SVG: lines and points over two axes, in the colours of the page's style."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from statistics import fmean

from torchweld.pages.page import slug

WIDTH, HEIGHT = 640, 340
LEFT, RIGHT, TOP, BOTTOM = 76, 16, 14, 46  # around the plot
COLOURS = 6
DASHES = ("", "7 3", "2 3", "9 3 2 3")
MOST = 500  # points of a line: more cannot be told apart
FEW = 30  # points of a line that have marks

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """Points (x, y), joined by a line or each by itself.

    Attributes:
        labels: what a pointer over each point is told; of points that are not joined.
        faint: a line that others are drawn over.
        colour: its number; a line of levels that nothing else has by default.
    """

    name: str
    points: Sequence[Point]
    joined: bool = True
    labels: Sequence[str] = ()
    faint: bool = False
    colour: int | None = None
    dash: int = 0


@dataclass(frozen=True)
class Axis:
    """What it measures, and whether its ticks are powers of ten."""

    name: str
    log: bool = False


@dataclass
class _Scale:
    """From values to pixels."""

    axis: Axis
    low: float
    high: float
    start: float
    end: float
    ticks: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.axis.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            steps = (1,) if last - first > 3 else (1, 2, 5)
            every = [step * 10.0**power for power in range(first, last + 1) for step in steps]
            self.low, self.high = self.low / 1.2, self.high * 1.2
            self.ticks = [tick for tick in every if self.low <= tick <= self.high]
        else:
            width = (self.high - self.low) or abs(self.high) or 1.0
            step = 10.0 ** math.floor(math.log10(width / 5))
            step = next(step * factor for factor in (1, 2, 5, 10) if width / (step * factor) <= 6)
            self.low, self.high = math.floor(self.low / step) * step, math.ceil(self.high / step) * step
            if self.low == self.high:
                self.low, self.high = self.low - step, self.high + step
            self.ticks = [self.low + i * step for i in range(round((self.high - self.low) / step) + 1)]

    def __call__(self, value: float) -> float:
        measure: Callable[[float], float] = math.log10 if self.axis.log else float
        share = (measure(value) - measure(self.low)) / (measure(self.high) - measure(self.low))
        return self.start + share * (self.end - self.start)


def chart(
    caption: str, x: Axis, y: Axis, series: Sequence[Series], levels: Mapping[str, float] | None = None, lead: str = ""
) -> str:
    """A figure with its key below. `levels`: horizontal lines by their names. Empty text where there are no points."""
    every = [point for each in series for point in each.points]
    if not every:
        return ""
    levels = dict(levels or {})
    across = _Scale(x, *_range(p[0] for p in every), LEFT, WIDTH - RIGHT)
    up = _Scale(y, *_range(itertools.chain((p[1] for p in every), levels.values())), HEIGHT - BOTTOM, TOP)
    parts = [_frame(across, up)]
    keys = []
    for i, (name, value) in enumerate(levels.items()):
        style = f'class="line level" stroke-dasharray="{DASHES[1 + i % 3]}"'
        parts.append(f'<path {style} d="M{LEFT} {up(value):.1f}H{WIDTH - RIGHT}"/>')
        keys.append((f"{name}: {_short(value)}", f'<path {style} d="M0 7H30"/>'))
    for each in series:
        colour = "level" if each.colour is None else f"s{each.colour % COLOURS}"
        parts.append(_line(each, colour, across, up) if each.joined else _points(each, colour, across, up))
        sample = f'<path {_stroke(each, colour)} d="M0 7H30"/>' if each.joined else _mark(each, colour, 15, 7)
        keys.append((each.name, sample))
    name = slug(caption)
    drawn = "".join(parts)
    key = "".join(f'<li><svg viewBox="0 0 30 14" aria-hidden="true">{s}</svg>{escape(n)}</li>' for n, s in keys)
    return (
        f'<figure><div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="chart-{name}">'
        f'<title id="chart-{name}">{escape(caption)}</title>{drawn}</svg></div>'
        f'<ul class="key">{key}</ul><figcaption>{escape(lead or caption)}</figcaption></figure>'
    )


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most `MOST` points: means of neighbours."""
    size = math.ceil(len(points) / MOST)
    parts = [points[i : i + size] for i in range(0, len(points), size)] if size > 1 else [[p] for p in points]
    return [(fmean(x for x, _ in part), fmean(y for _, y in part)) for part in parts]


def _range(values: Iterator[float]) -> tuple[float, float]:
    found = list(values)
    return min(found), max(found)


def _frame(across: _Scale, up: _Scale) -> str:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for tick in up.ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {up(tick):.1f}H{right}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">{_short(tick)}</text>')
    for tick in across.ticks:
        parts.append(f'<path class="grid" d="M{across(tick):.1f} {bottom}V{bottom + 4}"/>')
        parts.append(f'<text x="{across(tick):.1f}" y="{bottom + 18}" text-anchor="middle">{_short(tick)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{right}"/>')
    parts.append(
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(across.axis.name)}</text>'
    )
    middle = (TOP + bottom) / 2
    turned = f'transform="rotate(-90 12 {middle})"'
    parts.append(f'<text x="12" y="{middle}" {turned} text-anchor="middle">{escape(up.axis.name)}</text>')
    return "".join(parts)


def _short(value: float) -> str:
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-")
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _stroke(series: Series, colour: str) -> str:
    dash = f' stroke-dasharray="{DASHES[series.dash % len(DASHES)]}"' if series.dash else ""
    return f'class="line {colour}{" faint" if series.faint else ""}"{dash}'


def _line(series: Series, colour: str, across: _Scale, up: _Scale) -> str:
    places = [(across(x), up(y)) for x, y in series.points]
    way = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    marks = [_mark(series, colour, x, y) for x, y in places] if len(places) <= FEW and not series.faint else []
    return f'<path {_stroke(series, colour)} d="M{way}"/>{"".join(marks)}'


def _points(series: Series, colour: str, across: _Scale, up: _Scale) -> str:
    labels = series.labels or [""] * len(series.points)
    marks = (_mark(series, colour, across(x), up(y), t) for (x, y), t in zip(series.points, labels, strict=True))
    return "".join(marks)


def _mark(series: Series, colour: str, x: float, y: float, label: str = "") -> str:
    """A circle, a square, or a diamond, so that the colour is not all that tells them apart."""
    title = f"<title>{escape(label)}</title>" if label else ""
    kind = f'class="point {colour}{" hollow" if series.dash else ""}"'
    if series.dash == 0:
        return f'<circle {kind} cx="{x:.1f}" cy="{y:.1f}" r="4">{title}</circle>'
    if series.dash == 1:
        return f'<rect {kind} x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7">{title}</rect>'
    return f'<path {kind} d="M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5-5z">{title}</path>'
