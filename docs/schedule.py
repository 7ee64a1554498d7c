#!/usr/bin/env python3
"""Draws schedules: `python docs/schedule.py NAME.txt ...` writes NAME.svg beside each text. Standard library only.

A schedule shows who works on what over time, and who waits for whom. Time runs downwards, so that the picture fits a
narrow page. A text has one element per line; `#` begins a comment, and words with spaces stand in quotes:

    title "..."                          the heading
    note "..."                           a line of text below the heading; may be repeated
    lane ID "NAME" "DETAIL"              a column
    kind ID "MEANING"                    a kind of span, with a colour of its own (at most six)
    wait ID "MEANING"                    a kind of arrow, with a line style of its own (at most three)
    span LANE BEGIN END KIND "LABEL" [ID]
    arrow WAIT FROM TO                   from the end of the span FROM to the beginning of the span TO

The script refuses a text that it cannot draw legibly: spans that overlap, or a label that does not fit its box.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from textwrap import wrap
from typing import NoReturn

WIDTH, MARGIN, GAP = 480, 8, 18  # of the picture, of its border, between columns
ROW, FONT, SMALL = 28, 12, 10  # height of a unit of time, sizes of text
GLYPH = 0.53  # mean width of a character, in units of the size of the text

# Fill in light and in dark mode; dash patterns.
COLOURS = (
    *(("#cfe3ff", "#1f4b7d"), ("#ffd9b8", "#7a4313"), ("#cdeccf", "#23592b")),
    *(("#e4d4f7", "#513378"), ("#e3e3e3", "#4a4a4a"), ("#ffd0d6", "#7c2836")),
)
DASHES = ("", "5 3", "1.5 3")

STYLE = """
  text { font-family: system-ui, sans-serif; fill: #1b1f24; }
  .edge { stroke: #57606a; stroke-width: 0.7; }
  .lane { fill: #f4f6f8; }
  .arrow { stroke: #1b1f24; stroke-width: 1.3; fill: none; }
  .head { fill: #1b1f24; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; }
    .edge { stroke: #8b949e; }
    .lane { fill: #1c2128; }
    .arrow { stroke: #e6edf3; }
    .head { fill: #e6edf3; }
  }"""


@dataclass
class Span:
    """A box of one lane, from `begin` to `end` in units of time."""

    lane: str
    begin: float
    end: float
    kind: str
    label: str


@dataclass
class Schedule:
    """What a text says."""

    title: str = ""
    notes: list[str] = field(default_factory=list)
    lanes: dict[str, tuple[str, str]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    waits: dict[str, str] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    named: dict[str, Span] = field(default_factory=dict)
    arrows: list[tuple[str, Span, Span]] = field(default_factory=list)


def parse(text: str) -> Schedule:
    """The schedule of a text. Raises ValueError, with the number of the line, for a text that cannot be drawn."""
    found = Schedule()
    for number, line in enumerate(text.splitlines(), 1):
        try:
            words = shlex.split(line, comments=True)
            if words:
                _read(found, words)
        except (KeyError, ValueError) as error:
            raise ValueError(f"line {number}: {error}: {line.strip()}") from error
    return found


def _read(found: Schedule, words: list[str]) -> None:
    match words:
        case ["title", title]:
            found.title = title
        case ["note", note]:
            found.notes += wrap(note, int((WIDTH - 2 * MARGIN) / SMALL / GLYPH))
        case ["lane", name, heading, detail]:
            found.lanes[name] = heading, detail
        case ["kind", name, meaning]:
            found.kinds[name] = meaning
        case ["wait", name, meaning]:
            found.waits[name] = meaning
        case ["span", lane, begin, end, kind, label, *name]:
            span = Span(lane, float(begin), float(end), kind, label)
            found.lanes[lane], found.kinds[kind]
            for other in found.spans:
                if other.lane == lane and other.begin < span.end and span.begin < other.end:
                    _refuse(f"overlaps the span {other.label!r}")
            found.spans.append(span)
            found.named |= dict.fromkeys(name, span)
        case ["arrow", wait, start, end]:
            found.waits[wait]
            found.arrows.append((wait, found.named[start], found.named[end]))
        case _:
            _refuse("not an element of a schedule")


def _refuse(reason: str) -> NoReturn:
    raise ValueError(reason)


def _fits(label: str, width: float, size: int) -> None:
    if len(label) * size * GLYPH > width:
        _refuse(f"{label!r} is too long by about {len(label) - width / size / GLYPH:.0f} characters")


def _text(x: float, y: float, label: str, size: int, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}"{more}>{escape(label)}</text>'


def draw(schedule: Schedule) -> str:
    """The schedule as SVG."""
    columns = len(schedule.lanes)
    width = (WIDTH - 2 * MARGIN - (columns - 1) * GAP) / columns
    left = {lane: MARGIN + n * (width + GAP) for n, lane in enumerate(schedule.lanes)}
    middle = ' text-anchor="middle"'
    body: list[str] = []

    # Heading.
    y = 22.0
    body.append(_text(MARGIN, y, schedule.title, 14, ' font-weight="600"'))
    for note in schedule.notes:
        y += 15
        body.append(_text(MARGIN, y, note, SMALL))

    # Legend: kinds in two columns, then waits.
    half = (WIDTH - 2 * MARGIN) / 2
    entries = [*schedule.kinds.items(), *schedule.waits.items()]
    y += 12
    for n, (name, meaning) in enumerate(entries):
        x, row = MARGIN + n % 2 * half, y + n // 2 * 16
        _fits(meaning, half - 30, SMALL)
        if n < len(schedule.kinds):
            body.append(f'<rect class="edge k{n}" x="{x:g}" y="{row:g}" width="20" height="11" rx="2"/>')
        else:
            body.append(_arrow(x, row + 6, x + 20, row + 6, list(schedule.waits).index(name)))
        body.append(_text(x + 26, row + 9.5, meaning, SMALL))
    y += (len(entries) + 1) // 2 * 16 + 16

    # Lanes.
    for lane, (heading, detail) in schedule.lanes.items():
        _fits(heading, width, FONT)
        _fits(detail, width, SMALL)
        body.append(_text(left[lane] + width / 2, y, heading, FONT, middle + ' font-weight="600"'))
        body.append(_text(left[lane] + width / 2, y + 13, detail, SMALL, middle))
    top = y + 22
    bottom = top + max((s.end for s in schedule.spans), default=0) * ROW + 6
    body += [
        f'<rect class="lane" x="{x:g}" y="{top - 4:g}" width="{width:g}" height="{bottom - top + 4:g}" rx="3"/>'
        for x in left.values()
    ]

    # Arrows first: they pass behind the spans of other lanes, and are seen between the lanes.
    for wait, start, end in schedule.arrows:
        rightwards = left[end.lane] > left[start.lane]
        x1, x2 = (
            (left[start.lane] + width, left[end.lane]) if rightwards else (left[start.lane], left[end.lane] + width)
        )
        y1, y2 = top + start.end * ROW - 4, top + end.begin * ROW + 5
        body.append(_arrow(x1, y1, x2, y2, list(schedule.waits).index(wait)))
    for span in schedule.spans:
        _fits(span.label, width - 4, SMALL)
        x, y, height = left[span.lane], top + span.begin * ROW, (span.end - span.begin) * ROW
        kind = list(schedule.kinds).index(span.kind)
        body.append(
            f'<rect class="edge k{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height - 1:g}" rx="2"/>'
        )
        body.append(_text(x + width / 2, y + height / 2 + 3, span.label, SMALL, middle))

    height = bottom + MARGIN
    fills = "".join(f"\n  .k{n} {{ fill: {light}; }}" for n, (light, _) in enumerate(COLOURS))
    dark = "".join(f" .k{n} {{ fill: {dark}; }}" for n, (_, dark) in enumerate(COLOURS))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:g}" '
            f'viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(schedule.title)}">',
            f"<style>{STYLE}{fills}\n  @media (prefers-color-scheme: dark) {{{dark} }}\n</style>",
            *body,
            "</svg>\n",
        ]
    )


def _arrow(x1: float, y1: float, x2: float, y2: float, style: int) -> str:
    dash = f' stroke-dasharray="{DASHES[style]}"' if DASHES[style] else ""
    length = ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5
    ux, uy = (x2 - x1) / length, (y2 - y1) / length
    bx, by = x2 - 6 * ux, y2 - 6 * uy
    head = f"{x2:.1f},{y2:.1f} {bx - 3 * uy:.1f},{by + 3 * ux:.1f} {bx + 3 * uy:.1f},{by - 3 * ux:.1f}"
    return (
        f'<path class="arrow" d="M{x1:.1f} {y1:.1f} L{bx:.1f} {by:.1f}"{dash}/><polygon class="head" points="{head}"/>'
    )


def main(paths: list[str]) -> None:
    for path in map(Path, paths):
        path.with_suffix(".svg").write_text(draw(parse(path.read_text())))


if __name__ == "__main__":
    main(sys.argv[1:])
