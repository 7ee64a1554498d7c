"""One page: headings, tiles, pictures and text, in a template that is shipped beside this file."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from torchweld.files import write_text

_ROOM = 400_000  # bytes of a picture that a page takes in; a larger one stays beside it


class Page:
    """A page that is written section by section. All texts are escaped, except what `add` is given.

    Attributes:
        sections: the HTML of each, by its heading.
    """

    def __init__(self, title: str, lead: str, foot: str) -> None:
        self.title, self.lead, self.foot = title, lead, foot
        self.sections: dict[str, list[str]] = {}

    def add(self, heading: str, *parts: str) -> None:
        """Adds HTML to the section of this heading, which begins here if there is none. Empty parts are left out."""
        if found := [part for part in parts if part]:
            self.sections.setdefault(heading, []).extend(found)

    def html(self) -> str:
        """The whole page."""
        contents = [f'<li><a href="#{slug(h)}">{escape(h)}</a></li>' for h in self.sections]
        body = [
            f'<section aria-labelledby="{slug(h)}">\n<h2 id="{slug(h)}">{escape(h)}</h2>\n' + "\n".join(parts)
            for h, parts in self.sections.items()
        ]
        return Template(_part("page.html")).substitute(
            title=escape(self.title),
            lead=escape(self.lead),
            foot=escape(self.foot),
            style=_part("style.css"),
            script=_part("script.js"),
            contents="\n".join(contents),
            body="\n</section>\n".join([*body, ""]),
        )

    def write(self, path: Path) -> Path:
        """Writes the page, and returns the path.

        Raises:
            UserError: the file cannot be written.
        """
        return write_text(path, self.html())


def _part(name: str) -> str:
    return files("torchweld.pages").joinpath(name).read_text(encoding="utf-8")


def slug(text: str) -> str:
    """The id of what `text` names."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def text(words: str, kind: str = "") -> str:
    """A paragraph. `kind`: a class of the style, such as "quiet" or "alert"."""
    return f'<p class="{kind}">{escape(words)}</p>' if kind else f"<p>{escape(words)}</p>"


def heading(words: str) -> str:
    """A heading within a section."""
    return f"<h3>{escape(words)}</h3>"


def verbatim(words: str) -> str:
    """Text whose lines stay as they are."""
    return f"<pre>{escape(words)}</pre>"


def tiles(values: Mapping[str, str]) -> str:
    """The few numbers that matter most, each with its name."""
    each = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in values.items())
    return f'<dl class="tiles">{"".join(each)}</dl>'


def pairs(values: Mapping[str, object]) -> str:
    """Names and values, a line each."""
    each = (f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in values.items())
    return f'<dl class="pairs">{"".join(each)}</dl>'


def points(lines: Mapping[str, str]) -> str:
    """A list of sentences, each with its subject in front."""
    return "<ul>" + "".join(f"<li><b>{escape(n)}</b> {escape(line)}</li>" for n, line in lines.items()) + "</ul>"


def beside(*parts: str) -> str:
    """Figures and tables, as many in a row as the page has room for."""
    return f'<div class="beside">{"".join(parts)}</div>' if any(parts) else ""


def picture(path: Path, words: str, pixels: bool = False) -> str:
    """A PNG within the page, or a link to it where it is large. `pixels`: it is small and drawn with hard edges."""
    content, name = path.read_bytes(), escape(words)
    if len(content) > _ROOM:
        return f'<p><a href="{escape(path.name)}">{name}</a></p>'
    kind = ' class="pixels"' if pixels else ""
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return f'<figure><img{kind} src="{source}" alt="{name}"><figcaption>{name}</figcaption></figure>'
