"""Fixtures: the compiled instruction sets, torch's threads, and the skip of what needs a GPU."""

from __future__ import annotations

import importlib.util
import os
import sys
import unittest
from collections.abc import Iterator
from types import ModuleType

# Before torch is imported, here and in the processes of pytest-xdist: workers share the cores, so a thread that waits
# must not spin, nor inductor start compilers of its own.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# torch's data bases of tests import a package of which they take one class, a base. A machine with a GPU may lack it.
if importlib.util.find_spec("expecttest") is None:
    sys.modules["expecttest"] = ModuleType("expecttest")
    sys.modules["expecttest"].__dict__["TestCase"] = unittest.TestCase

import pytest
import torch
from hypothesis import settings

from torchweld import _cpu, backend

pytest_plugins = ["emulation.plugin"]


# On a build machine the same cases on every run: what fails there is the change, not the draw.
settings.register_profile("same", derandomize=True, database=None, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("same")


# Files that sweep torch's data bases of operators, modules and optimizers, families of models, trainers, sizes.
SWEEPS = {
    *("test_op_db.py", "test_module_db.py", "test_optim_db.py", "test_large_shapes.py"),
    *("test_hugging_face_families.py", "test_trainers.py", "test_models.py", "test_accelerate.py"),
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "xdist_group(name): on one process of pytest-xdist, which may be missing")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: a process holds half a gigabyte, and beyond a few of them the longest test decides."""
    return min(os.cpu_count() or 1, 8)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = backend.unavailable("cuda")
    for item in items:
        if item.path.name in SWEEPS:
            item.add_marker(pytest.mark.slow)
        if reason and item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason=f"no CUDA kernels here: {reason}"))


# avx512_bf16_fma has kernels of two others, as test_build.py holds it to.
ISAS = [name for name in _cpu.available_isas() if name != "avx512_bf16_fma"]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per instruction set that this CPU has."""
    before = _cpu.isa()
    _cpu.use_isa(request.param)
    assert _cpu.isa() == request.param
    yield request.param
    _cpu.use_isa(before)


@pytest.fixture
def each_isa() -> Iterator[Iterator[str]]:
    """The instruction sets one after another, for a test that works out for all of them what is right."""
    before = _cpu.isa()

    def each() -> Iterator[str]:
        for name in ISAS:
            _cpu.use_isa(name)
            yield name

    yield each()
    _cpu.use_isa(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores torch's number of threads after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# The same draws on every run, wherever a test draws: as its module is imported, in fixtures of a module or a session,
# in the test itself.
def pytest_collectstart() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
