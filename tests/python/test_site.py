"""The site of docs/: it builds without a warning, its links lead somewhere, and Chromium shows it whole."""

from __future__ import annotations

import fcntl
import functools
import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import pytest

from browser import TOO_FAINT, TOO_WIDE, UNNAMED, chromium

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
LARGEST = 1_500_000  # bytes of a page with all that it loads
LOOKED_AT = ("index.html", "start.html", "ops/attention.html", "guides/benchmark.html", "api/optim.html", "search.html")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site, which the processes of a run share: the first builds it, the others wait."""
    for package in ("sphinx", "myst_parser", "pydata_sphinx_theme", "sphinx_copybutton", "matplotlib"):
        pytest.importorskip(package, reason=f"needs {package}, of the docs extra")
    if not (ROOT / "bench/results").is_dir():
        pytest.skip("no bench/results, of which the site draws plots: a source distribution has none")
    folder = tmp_path_factory.getbasetemp()
    out = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "site"
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", f"{out}.doctrees", "docs", str(out)]
    with Path(f"{out}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not Path(f"{out}.built").exists():
            done = subprocess.run(
                command,
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            assert done.returncode == 0, done.stderr
            Path(f"{out}.built").touch()
    return out


class Page(HTMLParser):
    """The links, pictures and anchors of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if identity := found.get("id"):
            self.anchors.add(identity)
        if tag == "a" and (href := found.get("href")):
            self.links.append(href)
        for name in ("src", "href") if tag in ("img", "script", "link") else ():
            if value := found.get(name):
                self.loads.append(value)


def test_links_lead_somewhere_and_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = {p.relative_to(site).as_posix(): Page(p) for p in site.rglob("*.html") if "_static" not in p.parts}
    assert len(pages) > 50
    for name, page in pages.items():
        for target in (*page.links, *page.loads):
            if urlsplit(target).scheme:
                assert target in page.links, f"{name} loads {target}"
                continue
            path, anchor = urldefrag(urljoin(name, target))
            path = unquote(urlsplit(path).path)
            assert (site / path).is_file(), f"{name}: {target}"
            if anchor and path in pages:
                assert unquote(anchor) in pages[path].anchors, f"{name}: {target}"


def test_what_a_build_draws(site: Path) -> None:
    """The rows of the results, and schedules, are on the pages."""
    page = (site / "ops/attention.html").read_text()
    assert "attention forward: 1 x 8 x 4096 x 64 causal, window 256" in page
    assert page.count("../_images/schedule-") == 6 and "../_images/speed-attention.svg" in page
    speeds = (site / "_images/speed-attention.svg").read_text()
    assert "31.88" in speeds and "var(--ink)" in speeds and "#010101" not in speeds
    assert "<math" in page and "MathJax" not in page


@pytest.fixture(scope="module")
def served(site: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def browser(served: str) -> Iterator[Any]:
    with chromium() as found:
        yield found


def test_pages_are_whole_on_a_phone(browser: Any, served: str, site: Path) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740})
    tab, sizes = context.new_page(), []
    tab.on("response", lambda answer: sizes.append(int(answer.headers.get("content-length", 0))))
    for path in sorted(p.relative_to(site).as_posix() for p in site.rglob("*.html") if "_static" not in p.parts):
        sizes.clear()
        tab.goto(served + path)
        assert tab.evaluate("document.documentElement.scrollWidth") == 360, path
        assert tab.evaluate(TOO_WIDE) == [], path
        assert sum(sizes) < LARGEST, path
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_legible(browser: Any, served: str, scheme: str) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
    messages: list[str] = []
    tab = context.new_page()
    tab.on("console", lambda said: messages.append(said.text) if said.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: messages.append(str(error)))
    for path in LOOKED_AT:
        tab.goto(served + path)
        for question in (TOO_WIDE, TOO_FAINT, UNNAMED):
            assert tab.evaluate(question) == [], path
    assert messages == []
    context.close()


def test_the_search_finds_a_sliding_window(browser: Any, served: str) -> None:
    tab = browser.new_page()
    tab.goto(served + "search.html?q=sliding+window")
    tab.wait_for_selector("#search-results li a", timeout=10_000)
    found = tab.locator("#search-results li a").evaluate_all("links => links.map((link) => link.getAttribute('href'))")
    assert any(href.startswith("ops/attention.html") for href in found), found
    assert any(href.startswith("guides/long_context.html") for href in found), found
    tab.close()
