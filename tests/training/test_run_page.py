"""The page of a training run, and what it has from the program."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from commands import Run
from torchweld.training.findings import Findings

OURS = {"ours": {"accuracy": 0.9, "squared error": 0.25}}
OTHERS = {"most frequent": {"accuracy": 0.5}, "<regression>": {"accuracy": 0.9, "squared error": 0.01}}


@pytest.fixture
def found(tmp_path: Path) -> Findings:
    return Findings(Console(file=io.StringIO(), width=100, markup=False), tmp_path)


def printed(found: Findings) -> str:
    assert isinstance(found.console.file, io.StringIO)
    return found.console.file.getvalue()


def test_scores_go_to_terminal_file_and_page_with_the_best_marked(found: Findings) -> None:
    found.scores("10 images", OURS, OTHERS)
    assert "0.900*" in printed(found) and "0.0100*" in printed(found) and "0.2500 " in printed(found)
    assert json.loads((found.out / "scores.json").read_text()) == {**OURS, **OTHERS}
    shown = found.parts[0]
    assert re.findall(r'class="number best"[^>]*>([\d.]+)<', shown) == ["0.900", "0.900", "0.0100"]  # lower is better
    assert '<tr class="ours"><th scope="row">ours</th>' in shown and "&lt;regression&gt;" in shown
    assert '<td class="number">-</td>' in shown  # what was not measured


def test_what_is_printed_is_in_the_page_too(found: Findings) -> None:
    table = Table("source", "translation", title="held-out <sentences>")
    table.add_row("a < b", "c [bold]d[/bold]")
    found.print(table)
    found.print("try it: torchweld")
    found.sample("sample", "class A:\n    x < y")
    found.introduce("device", "cpu")
    for text in ("a < b", "try it: torchweld", "    x < y", "device: cpu"):
        assert text in printed(found)
    page = "\n".join(found.parts)
    for text in ("held-out &lt;sentences&gt;", "a &lt; b", "try it: torchweld", "<pre>class A:\n    x &lt; y</pre>"):
        assert text in page
    assert found.settings == {"device": "cpu"} and "device: cpu" not in page


@pytest.mark.slow
def test_a_run_leaves_its_page(train: Run) -> None:
    arguments = ("--steps", 12, "--validate-every", 4, "--compare", "torch", "--out", "run")
    code, out, _ = train(*arguments)
    assert code == 0 and "all of it in a page: run/report.html" in out
    text = Path("run/report.html").read_text()
    for heading in ("Summary", "Results", "Losses", "Speed", "Memory", "Configuration"):
        assert f">{heading}</h2>" in text
    losses, speeds = re.findall(r"<figure>.*?</figure>", text, re.S)
    assert "unigram entropy of the validation tokens" in losses and "level" in losses
    drawn = [
        way.count("L") + 1
        for way in re.findall(r'<path class="line s\d[^"]*"[^>]* d="M(\d[^"]*)"', losses)
        if "L" in way
    ]
    assert drawn == [12, 3, 12, 3]  # training and validation, of both
    assert [name in speeds for name in ("torchweld</li>", "torch</li>")] == [True, True]
    assert "torchweld / torch = " in text and re.search(r"largest use of the process</dt><dd>[\d,]+ MB", text)
    assert "<dt>learning rate</dt><dd>0.003</dd>" in text and "<dt>n head</dt><dd>2</dd>" in text
    assert re.search("<h3>sample</h3>\n<pre>", text)
