"""The drawn schedules: each committed SVG is what docs/schedule.py makes of the text beside it."""

from __future__ import annotations

import importlib.util
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXTS = sorted(p for p in (ROOT / "csrc").rglob("*.txt") if p.name != "CMakeLists.txt")


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("schedule", ROOT / "docs/schedule.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["schedule"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


schedule = load()


def test_there_are_schedules() -> None:
    assert len(TEXTS) >= 6
    assert {p.with_suffix(".txt") for p in (ROOT / "csrc").rglob("*.svg")} == set(TEXTS)


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: str(p.relative_to(ROOT / "csrc")))
def test_the_picture_is_that_of_the_text(path: Path) -> None:
    picture = path.with_suffix(".svg").read_text()
    assert picture == schedule.draw(schedule.parse(path.read_text())), f"run: python docs/schedule.py {path}"
    root = ET.fromstring(picture)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for box in root.iter("{http://www.w3.org/2000/svg}rect"):
        x, y, w, h = (float(box.attrib[n]) for n in ("x", "y", "width", "height"))
        assert x >= 0 and y >= 0 and x + w <= width and y + h <= height


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('span a 1 2 k "too late"', "overlaps the span 'first'"),
        ('span a 3 4 k "a label that no column of this width has room for, however it is written"', "too long"),
        ('span b 3 4 k "no such lane"', "'b'"),
        ("arrow w x y", "'w'"),
        ('swimlane a "A"', "not an element of a schedule"),
    ],
)
def test_what_cannot_be_drawn_is_refused(line: str, fault: str) -> None:
    text = f'lane a "A" ""\nlane c "C" ""\nkind k "K"\nspan a 0 1.5 k "first"\n{line}'
    with pytest.raises(ValueError) as error:
        schedule.draw(schedule.parse(text))
    assert fault in str(error.value)
