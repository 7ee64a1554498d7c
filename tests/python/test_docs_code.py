"""The pages of docs/: their code runs as it stands there, and they speak of every operator, example and variable."""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fresh import python
from torchweld import ops

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md"))


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """What a page may change for the process."""
    threads, log = torch.get_num_threads(), logging.getLogger("torchweld")
    level, handlers = log.level, list(logging.root.handlers)
    yield
    torch.set_num_threads(threads)
    log.setLevel(level)
    logging.root.handlers[:] = handlers


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_code_of_a_page_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = blocks(page, "python")
    if any("transformers" in block for block in code):
        pytest.importorskip("transformers", reason="needs transformers, of the test extra")
    if any("init_process_group" in block for block in code):  # its threads do not end well beside an interpreter
        done = python("\n".join([*code, "import os", "os._exit(0)"]), OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
        return
    names: dict[str, Any] = {"__name__": "page"}
    for number, block in enumerate(code):
        exec(compile(block, f"{page}, block {number}", "exec"), names)
    capsys.readouterr()


def test_the_code_of_other_libraries_is_python() -> None:
    theirs = [(page, block) for page in PAGES for block in blocks(page, "py")]
    assert len(theirs) >= 10
    for page, block in theirs:
        assert page.startswith("coming_from/")
        ast.parse(block, page)


def test_every_operator_has_a_page() -> None:
    assert {p.stem for p in (DOCS / "ops").glob("*.md")} == {"index", *ops.__all__}
    index = (DOCS / "ops/index.md").read_text()
    for name in ops.__all__:
        page = (DOCS / f"ops/{name}.md").read_text()
        titles = re.findall(r"^## (.*)$", page, re.MULTILINE)
        assert titles == ["Formula", "Example", "Arguments, shapes and errors", "Backends", "Schedule", "Measured"], (
            name
        )
        assert f".. autofunction:: torchweld.ops.{name}\n" in page and f"torchweld.reference.{name}`" in page
        assert f"[{name}]({name}.md)" in index and f"\n{name}\n" in index


def test_every_example_is_shown() -> None:
    shown = set(re.findall(r"examples/(\w+\.(?:py|ipynb))", (DOCS / "examples.md").read_text()))
    assert shown == {p.name for p in (ROOT / "examples").iterdir() if p.suffix in (".py", ".ipynb")}


def test_every_variable_is_listed() -> None:
    """What the package and its build read from the environment."""
    sources = [*(ROOT / "python").rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp"), ROOT / "pyproject.toml"]
    read = {
        name
        for path in sources
        for name in re.findall(r'(?:getenv\(|environ\.get\(|environ\[|env = )"(TORCHWELD_\w+)"', path.read_text())
    }
    listed = set(re.findall(r"^\| `(TORCHWELD_\w+)`", (DOCS / "guides/environment.md").read_text(), re.MULTILINE))
    assert {"TORCHWELD_BACKEND", "TORCHWELD_CPU_ISA", "TORCHWELD_CUDA"} <= read <= listed
