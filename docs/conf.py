"""How Sphinx builds this folder: `sphinx-build -W docs build/docs`, with the extra `docs` installed."""

from __future__ import annotations

import sys
import urllib.request
from pathlib import Path

import torchweld

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "_ext")]

project = "torchweld"
author = "torchweld contributors"
copyright = "torchweld contributors"
version = release = torchweld.__version__

extensions = [
    *("myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.intersphinx", "sphinx.ext.autosummary"),
    *("sphinx_copybutton", "docstrings", "formulas", "root_links", "measured", "backends", "schedules"),
]
exclude_patterns = ["_ext", "schedules"]
root_doc = "index"

# A name in single backticks is a link where it is known, and code elsewhere.
default_role = "py:obj"
add_function_parentheses = False
python_maximum_signature_line_length = 80
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autosummary_generate = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
copybutton_exclude = ".linenos, .gp, .go"


def _reachable(url: str) -> bool:
    """Whether the inventory of another project's names can be read; a build without a network links to none."""
    try:
        with urllib.request.urlopen(f"{url}objects.inv", timeout=3) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


intersphinx_mapping = {
    name: (url, None)
    for name, url in {
        "torch": "https://docs.pytorch.org/docs/stable/",
        "python": "https://docs.python.org/3/",
    }.items()
    if _reachable(url)
}

html_math_renderer = "mathml"
html_theme = "pydata_sphinx_theme"
html_title = "torchweld"
html_favicon = "_static/mark.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_domain_indices = False
html_show_sourcelink = False
html_copy_source = False
html_context = {"default_mode": "auto"}
html_theme_options = {
    "logo": {"image_light": "_static/mark.svg", "image_dark": "_static/mark.svg", "text": "torchweld", "alt_text": ""},
    "show_prev_next": True,
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "primary_sidebar_end": [],
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
    "search_bar_text": "Search",
}
