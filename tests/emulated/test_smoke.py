"""bench/smoke.py, the first look at a GPU: families on the emulated GPU, and what it makes of processes that fail."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from torchweld import backend
from torchweld.testing import Case

PATH = Path(__file__).parents[2] / "bench/smoke.py"


@pytest.fixture(scope="module")
def smoke() -> Any:
    spec = importlib.util.spec_from_file_location("smoke", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("queries", [1, 70])
def test_attention_on_the_emulated_gpu(
    queries: int, smoke: Any, emulated: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a size that the machine can run: the same checks, and a wrong kernel is seen."""
    monkeypatch.setattr(sys.modules[Case.__module__], "_DRAWS", 1)
    emulated.set_machine(capability=90)
    small = smoke.attention(64, queries=queries, keys=90)
    checks = [smoke.Check(small, torch.bfloat16), smoke.Check(small, torch.bfloat16, inference=True)]
    assert smoke.verdict(checks, "cpu") == "right"
    monkeypatch.setattr(type(small), "ours", lambda self, x: {n: t * 1.5 for n, t in self.torch(x).items()})
    assert smoke.verdict(checks, "cpu").startswith("wrong by ")


def test_a_family_that_no_kernel_serves(smoke: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    small = smoke.attention(64, queries=3, keys=5)

    def refuse(*_: Any) -> None:
        raise backend.NotServedError("attention", "cuda", "a reason")

    monkeypatch.setattr(type(small), "ours", refuse)
    assert smoke.verdict([smoke.Check(small, torch.float32)], "cpu") == "no kernels"


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("print('noise'); print('wrong by 3')", "wrong by 3"),
        ("import time; time.sleep(60)", "hangs"),
        ("raise RuntimeError('an illegal memory access')", "error: RuntimeError: an illegal memory access"),
        ("import os; os._exit(7)", "error: exit code 7"),
    ],
)
def test_what_becomes_of_a_process(program: str, outcome: str, smoke: Any) -> None:
    assert smoke.outcome([sys.executable, "-c", program], 5) == outcome


def test_every_family_is_asked_in_a_process_of_its_own(
    smoke: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def answer(command: list[str], seconds: float) -> str:
        asked.append((command[-1], seconds))
        return "hangs" if "backward" in command[-1] else "right"

    monkeypatch.setattr(smoke, "outcome", answer)
    assert smoke.main(["--seconds", "9"]) == 1
    assert sorted(asked) == sorted((name, 9) for name in smoke.families())
    assert "not: attention backward, D 64, bfloat16" in capsys.readouterr().out
    assert smoke.main(["layer_norm"]) == 0
    assert {"attention forward, D 256, float16", "attention atomics, D 64, bfloat16", "adamw, float32"} <= {
        name for name, _ in asked
    }
    with pytest.raises(SystemExit):
        smoke.main(["no such family"])
