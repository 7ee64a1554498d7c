"""The outline of a page, for tests of what torchweld writes."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise

VOID = {"meta", "input", "br", "img", "link"}


class Outline(HTMLParser):
    """Checks that elements close in the order in which they open; collects ids, labels and headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.headings: list[int] = []
        self.sources: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.ids += [str(found["id"])] if "id" in found else []
        self.links += [str(found["href"])] if "href" in found else []
        self.sources += [str(found["src"])] if "src" in found else []
        self.headings += [int(tag[1])] if re.fullmatch(r"h[1-6]", tag) else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def check(self) -> None:
        """Ids are unique, links lead into the page, nothing comes from elsewhere, no level of heading is left out."""
        assert len(self.ids) == len(set(self.ids)), self.ids
        assert {link.removeprefix("#") for link in self.links if link.startswith("#")} <= set(self.ids)
        assert all(source.startswith("data:image/png;base64,") for source in self.sources)
        assert self.headings[0] == 1 and max(b - a for a, b in pairwise(self.headings)) == 1
