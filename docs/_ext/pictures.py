"""Pictures that a build draws: SVG files beside the pages, with colours for a light and a dark page."""

from __future__ import annotations

from html import escape
from pathlib import Path

from docutils import nodes
from sphinx.environment import BuildEnvironment

INK = "#010101"  # what a plot draws text and lines in; the page's own colour takes its place
_STYLE = (
    "<style>:root { --ink: #1b1f24; } @media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; } }\n"
    "text { font-family: system-ui, sans-serif; }</style>"
)


def adaptive(svg: str) -> str:
    """The SVG of a plot with the ink of the page that shows it."""
    _, tag, rest = svg.partition("<svg")
    opening, end, body = rest.partition(">")
    return tag + opening + end + _STYLE + body.replace(INK, "var(--ink)")


def picture(env: BuildEnvironment, name: str, svg: str, alt: str, width: float) -> nodes.raw:
    """Writes `name`.svg where the built pages lie, and returns the node that shows it."""
    folder = Path(env.app.outdir, "_images")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.svg").write_text(svg)
    path = "../" * env.docname.count("/") + f"_images/{name}.svg"
    image = f'<img class="dark-light" src="{path}" alt="{escape(alt)}" width="{width:g}">'
    return wide(image, "Drawing")


def wide(html: str, label: str) -> nodes.raw:
    """What may be wider than a phone: a region that scrolls, with a tab stop for those who scroll by keys."""
    opening = f'<div class="wide" tabindex="0" role="group" aria-label="{escape(label)}">'
    return nodes.raw("", f"{opening}{html}</div>", format="html")
