"""torchbench's models through `patch`: what is compared, what is timed, and one of the suite's models on the CPU."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import torchweld

PATCHED = runpy.run_path(str(Path(__file__).resolve().parents[2] / "bench" / "suites" / "torchbench" / "patched.py"))


class Model:
    """What the suite's models have."""

    device = "cpu"

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.GELU()).eval()
        self.inputs = (torch.randn(4, 8),)
        self.calls = 0

    def get_module(self) -> tuple[torch.nn.Module, Any]:
        return self.module, self.inputs

    def invoke(self) -> None:
        self.calls += 1
        self.module(*self.inputs)


def test_the_results_of_both_are_compared() -> None:
    stock, ours = Model(), Model()
    torchweld.patch(ours.module)
    assert type(ours.module[1]).__module__.startswith("torchweld")
    assert PATCHED["difference"](stock, ours) < 1e-6
    with torch.no_grad():
        ours.module[0].weight.mul_(1.1)  # type: ignore[operator]
    assert PATCHED["difference"](stock, ours) > 1e-3


def test_both_are_timed_in_turn() -> None:
    stock, ours = Model(), Model()
    found = PATCHED["compare"](stock, ours, 0.0)
    assert stock.calls == ours.calls == 6  # a warm-up, and five rounds
    assert found["speedup_p20"] <= found["speedup"] <= found["speedup_p80"] and found["torch_ms"] > 0


def test_tensors_are_found_in_what_models_return() -> None:
    t, ids = torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    assert [x is t for x in PATCHED["_tensors"]({"a": (t, [t]), "b": ids, "c": None})] == [True, True]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_model_of_the_suite_keeps_its_results(checkout: Callable[[str], Path]) -> None:
    path = checkout("benchmark")
    pytest.importorskip("yaml", reason="pyyaml, which torchbench imports, is not installed")
    given = (path, "nanogpt", "eval", "cpu", 1)
    stock, (ours, report) = PATCHED["load"](*given), PATCHED["patched"](*given)
    assert "scaled_dot_product_attention" in str(report)
    assert PATCHED["difference"](stock, ours) < 1e-4
