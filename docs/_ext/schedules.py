"""The directive `schedule`: draws a text for docs/schedule.py, whose path from the root is its argument."""

from __future__ import annotations

import re
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import schedule
from pictures import picture

ROOT = Path(__file__).resolve().parents[2]


class ScheduleDirective(SphinxDirective):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        path = ROOT / self.arguments[0]
        self.env.note_dependency(str(path))
        found = schedule.parse(path.read_text())
        name = re.sub(r"\W+", "-", self.arguments[0].removesuffix(".txt"))
        told = " ".join([found.title, *found.notes])
        return [picture(self.env, f"schedule-{name}", schedule.draw(found), told, schedule.WIDTH)]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("schedule", ScheduleDirective)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
