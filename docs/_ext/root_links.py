"""Links of pages that stand at the root of the repository and are included here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"ARCHITECTURE.md": "architecture", "CHANGELOG.md": "changelog", "README.md": "index"}


class RootLinks(SphinxPostTransform):
    """A link to a page of this site; of another file of the repository the text alone."""

    default_priority = 8  # before MyST resolves links, at 9

    def run(self, **_: Any) -> None:
        for node in list(self.document.findall(pending_xref)):
            path = node["reftarget"].partition("#")[0]
            if node["reftype"] != "myst" or not path or not (ROOT / path).is_file():
                continue
            page = PAGES.get(path, path.removeprefix("docs/").removesuffix(".md") if path.startswith("docs/") else None)
            content = node[0].deepcopy()
            if page is not None:
                uri = self.app.builder.get_relative_uri(node["refdoc"], page)
                content = nodes.reference("", "", content, refuri=uri, internal=True)
            node.replace_self(content)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_post_transform(RootLinks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
