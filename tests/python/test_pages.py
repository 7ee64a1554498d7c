"""The parts of a page: charts, tables, pictures."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from torchweld.errors import UserError
from torchweld.pages import page
from torchweld.pages.charts import HEIGHT, MOST, WIDTH, Axis, Series, chart, thinned
from torchweld.pages.page import Page
from torchweld.pages.tables import Cell, Column, Row, table


def numbers(figure: str, pattern: str) -> list[tuple[float, ...]]:
    return [tuple(map(float, match)) for match in re.findall(pattern, figure)]


@pytest.mark.parametrize("log", [False, True], ids=["linear", "log"])
@pytest.mark.parametrize(
    "points",
    [[(1.0, 1.0)], [(5.0, 3.0), (5.0, 3.0)], [(1e-9, 2e9), (3.0, 4e12)], [(1.0, 100.0), (2.0, 101.0), (3.0, 99.5)]],
    ids=["one", "equal", "far", "near"],
)
def test_marks_stay_within_the_plot_in_their_order(points: list[tuple[float, float]], log: bool) -> None:
    found = chart("c", Axis("x", log=log), Axis("y", log=log), [Series("s", points, joined=False)])
    marks = numbers(found.split("</div>")[0], r'<circle[^>]* cx="([\d.]+)" cy="([\d.]+)"')
    assert len(marks) == len(points) and all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in marks)
    for (a, b), (p, q) in zip(pairwise(points), pairwise(marks), strict=True):
        assert (a[0] < b[0]) <= (p[0] < q[0]) and (a[1] < b[1]) <= (p[1] > q[1])


def test_a_level_stands_where_its_value_is() -> None:
    found = chart("c", Axis("x"), Axis("y"), [Series("s", [(0, 0.0), (1, 4.0)])], {"half": 2.0})
    ((level, _),) = numbers(found.split("</div>")[0], r'level"[^>]* d="M76 ([\d.]+)H(\d+)')
    ((_, low, _, high),) = numbers(found, r'd="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"')
    assert level == pytest.approx((low + high) / 2, abs=0.1) and "half: 2" in found


def test_no_points_are_no_chart_and_many_are_thinned() -> None:
    assert chart("c", Axis("x"), Axis("y"), [Series("s", [])]) == ""
    many = thinned([(float(i), 2.0 * i) for i in range(7 * MOST + 3)])
    assert len(many) <= MOST and all(y == pytest.approx(2 * x) for x, y in many)
    assert thinned([(1.0, 2.0)]) == [(1.0, 2.0)]


def test_text_is_escaped_everywhere() -> None:
    evil = '<script>"&'
    figure = chart(evil, Axis(evil), Axis(evil), [Series(evil, [(1, 1)], joined=False, labels=[evil])], {evil: 1.0})
    rows = [Row([evil, Cell(evil, 1.0, share=0.5, best=True)])]
    shown = table(evil, [Column(evil, choices=True), Column(evil, number=True)], rows, filters=True)
    made = Page(evil, evil, evil)
    made.add(evil, figure, shown, page.text(evil), page.heading(evil), page.tiles({evil: evil}), page.verbatim(evil))
    made.add(evil, page.pairs({evil: evil}), page.points({evil: evil}))
    assert evil not in made.html() and '<script>"' not in made.html()


def test_a_picture_is_within_the_page_or_beside_it(tmp_path: Path) -> None:
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    small.write_bytes(b"\x89PNG" + bytes(9))
    large.write_bytes(bytes(500_000))
    assert 'alt="samples"' in page.picture(small, "samples") and "data:image/png;base64,iVBORw" in page.picture(
        small, "samples"
    )
    assert page.picture(large, "samples") == '<p><a href="large.png">samples</a></p>'


def test_a_page_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a file that can be written, but got: Is a directory; name another"):
        Page("a", "b", "c").write(tmp_path)
    assert not list(tmp_path.parent.glob(f".{tmp_path.name}*"))
