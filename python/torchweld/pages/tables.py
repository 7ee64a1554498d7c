"""Tables that sort and filter in the browser, and heat maps, which are tables too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from torchweld.pages.page import slug

_SHORT = 24  # characters that a cell has on one line
_STEPS = (0.07, 0.5, 1.0, 2.0)  # log2 of a ratio from which a colour is the next darker one: 5%, 1.4, 2, 4


@dataclass(frozen=True)
class Column:
    """A heading.

    Attributes:
        number: cells are aligned to the right.
        choices: the filter offers the values one by one.
        wraps: long text takes several lines.
    """

    name: str
    number: bool = False
    choices: bool = False
    wraps: bool = True


@dataclass(frozen=True)
class Cell:
    """Text, the number that it stands for where the order of the text is not that of the numbers, and how it looks.

    Attributes:
        share: of the cell's width that a bar behind the text takes, from 0 to 1.
        best: the best of its column.
    """

    text: str
    value: float | None = None
    share: float | None = None
    best: bool = False


@dataclass(frozen=True)
class Row:
    """Cells. `kind`: a class of the style, such as "ours" or "wrong"."""

    cells: Sequence[Cell | str]
    kind: str = ""


def table(caption: str, columns: Sequence[Column], rows: Sequence[Row], filters: bool = False) -> str:
    """A table with a sorting button in each heading; with `filters` a form above it. Its first column names the rows.

    It scrolls within the page where the page is narrow.
    """
    name = f"table-{slug(caption)}"
    head = "".join(_heading(column) for column in columns)
    body = "".join(_row(row, columns) for row in rows)
    form = _filters(name, columns, rows) if filters else ""
    return (
        f'{form}<div{_class("scroll", *["tall"] * filters)} tabindex="0" role="region" aria-label="{escape(caption)}">'
        f'<table class="sortable" id="{name}"><caption><span>{escape(caption)}</span></caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _heading(column: Column) -> str:
    if not column.name:  # of the column that names the rows
        return "<td></td>"
    kind = _class(*["number"] * column.number)
    return f'<th scope="col"{kind}><button type="button">{escape(column.name)}</button></th>'


def _row(row: Row, columns: Sequence[Column]) -> str:
    cells = []
    for i, (cell, column) in enumerate(zip(row.cells, columns, strict=True)):
        found = Cell(cell) if isinstance(cell, str) else cell
        marks = {"number": column.number, "bar": found.share is not None, "best": found.best}
        attributes = _class(*(name for name, holds in marks.items() if holds), *(_long(found.text) * column.wraps))
        if found.value is not None and math.isfinite(found.value):
            attributes += f' data-v="{found.value:.6g}"'
        if found.share is not None:
            attributes += f' style="--share:{min(max(found.share, 0.0), 1.0):.0%}"'
        content = escape(found.text)
        cells.append(f'<th scope="row"{attributes}>{content}</th>' if i == 0 else f"<td{attributes}>{content}</td>")
    return f"<tr{_class(*row.kind.split())}>{''.join(cells)}</tr>"


def _long(text: str) -> list[str]:
    """Text that may take several lines."""
    return ["long"] * (len(text) > _SHORT)


def _class(*names: str) -> str:
    return f' class="{" ".join(names)}"' if names else ""


def _filters(name: str, columns: Sequence[Column], rows: Sequence[Row]) -> str:
    fields = ['<label>Words that a row has<input type="search" name="words"></label>']
    for i, column in enumerate(columns):
        if column.choices:
            texts = [cell if isinstance(cell, str) else cell.text for cell in (row.cells[i] for row in rows)]
            options = "".join(f"<option>{escape(each)}</option>" for each in dict.fromkeys(texts))
            fields.append(
                f'<label>{escape(column.name)}<select data-column="{i}"><option value="">all</option>{options}</select>'
                "</label>"
            )
    return (
        f'<form class="filters" data-table="{name}">{"".join(fields)}<button type="reset">Show all</button>'
        "<output></output></form>"
    )


def heat_map(caption: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    """Ratios by row and column: blue above 1, red below, darker as they are farther away."""
    columns = list(dict.fromkeys(name for cells in rows.values() for name in cells))
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = []
    for name, cells in rows.items():
        found = "".join(_heat(cells.get(column)) for column in columns)
        body.append(f'<tr><th scope="row"{_class(*_long(name))}>{escape(name)}</th>{found}</tr>')
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table class="heat">'
        f"<caption><span>{escape(caption)}</span></caption><thead><tr><td></td>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _heat(ratio: float | None) -> str:
    if ratio is None:
        return "<td></td>"
    far = math.log2(ratio)
    step = sum(abs(far) >= each for each in _STEPS)
    kind = [f"{'up' if far > 0 else 'down'}{step}"] if step else []
    return f"<td{_class(*kind)}>{ratio:.2f}</td>"
