"""Fixtures of the tests of training: a directory of their own, a text, and the command."""

from __future__ import annotations

import argparse
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import torchweld.ops
from commands import Run
from outline import Outline
from torchweld import cli
from torchweld.models import stock


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory and a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where a shell started the tests in the background and ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def text(home: Path) -> str:
    """The path of 100 kB of Python."""
    return str(shutil.copy(argparse.__file__, home / "text.py"))


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `torchweld ...`: (exit code, stdout, stderr). A refusal is one line."""

    def run(*words: object) -> tuple[int, str, str]:
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as error:  # argparse
            code = int(error.code or 0)
        out, err = capsys.readouterr()
        for page in Path().glob("*/report.html"):  # that of each run of the test
            Outline(page.read_text()).check()
        if code == 2:
            assert err.startswith("torchweld: error: ") and err.count("\n") == 1
        return code, out, err

    return run


@pytest.fixture
def train(text: str, command: Run) -> Run:
    """Runs `torchweld train gpt2 --config tiny` on the text; the process of the tests keeps its malloc."""
    options = ("--config", "tiny", "--device", "cpu", "--no-keep-memory", "--data", text)
    return lambda *words: command("train", "gpt2", *options, *words)


@pytest.fixture(params=[torchweld.ops, stock], ids=["torchweld", "stock"])
def ops(request: pytest.FixtureRequest) -> ModuleType:
    """What a model computes with."""
    return request.param
