"""Fixtures that run the CUDA kernels on the CPU, and the report of the lines that they reach."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from emulation import build, coverage
from torchweld import backend

_COVERAGE_TEST = "test_the_emulated_suite_reaches_the_kernels"
_report: list[str] = []


@pytest.fixture(scope="session")
def emulated_module() -> ModuleType:
    if reason := build.unavailable():
        pytest.skip(f"the CUDA kernels cannot be built for the CPU: {reason}")
    coverage.begin()
    return build.load()


@pytest.fixture
def emulated(emulated_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Replaces the CPU kernels by the CUDA kernels, on a GPU of 4 multiprocessors with Hopper's shared memory."""
    monkeypatch.setitem(backend.kernels, "cpu", emulated_module)
    emulated_module.set_machine()
    with backend.strict():
        yield emulated_module


@pytest.fixture
def kernel_lines(emulated_module: ModuleType) -> dict[str, dict[int, int]]:
    """How often each line of csrc/cuda has run on the machine so far. The end of the run reports it."""
    lines = coverage.measure(emulated_module)
    _report[:] = coverage.table(lines)
    return lines


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Runs the coverage test last, and skips it unless all tests that run kernels were chosen."""
    last = [item for item in items if item.name == _COVERAGE_TEST]
    items[:] = [item for item in items if item not in last] + last
    for item in items:
        # A test with one case here and one on the CPU asks for the fixture itself.
        if "emulated_module" in getattr(item, "fixturenames", ()) or "emulated" in item.name.partition("[")[2]:
            item.add_marker(pytest.mark.xdist_group("emulated"))
            item.add_marker(pytest.mark.slow)
    tests = Path(__file__).parent.parent
    wanted = {path for path in tests.rglob("test_*.py") if "emulated" in path.read_text()}
    chosen = config.option.keyword or config.option.markexpr or any("::" in argument for argument in config.args)
    if chosen or not wanted <= {item.path for item in items}:
        for item in last:
            item.add_marker(pytest.mark.skip(reason="needs the whole emulated suite, and only a part was chosen"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist, whose parent prints the report
        session.config.workeroutput["kernel_lines"] = _report


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    _report.extend(getattr(node, "workeroutput", {}).get("kernel_lines", ()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _report:
        terminalreporter.section("lines of csrc/cuda that have run on the CPU")
        for line in _report:
            terminalreporter.write_line(line)
