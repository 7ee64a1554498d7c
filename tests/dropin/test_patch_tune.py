"""patch(model, tune=...): swaps that are slower on the model's own inputs are taken back; the model notices nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import torchweld
from torchweld.patching import tune
from torchweld.patching.report import Entry, Report, Times


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(16) for _ in range(3))
        self.batch, self.dropout = torch.nn.BatchNorm1d(16), torch.nn.Dropout(0.5)
        self.gelu, self.never = torch.nn.GELU(approximate="tanh"), torch.nn.RMSNorm(16)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
        x = self.dropout(self.batch(x))
        for norm in self.norms:
            x = norm(x)
        return {"out": self.gelu(x) * scale}


def test_what_is_slower_is_taken_back_and_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []

    def times(report: Report, entry: Entry, step: Any) -> Times:
        step()
        timed.append(entry.name)
        return Times(now=2e-6, before=1e-6) if "GELU" in entry.was else Times(now=1e-3, before=3e-3)

    monkeypatch.setattr(tune, "_times", times)
    model = Model()
    report = torchweld.patch(model, tune=True, example_inputs=torch.randn(4, 16))
    assert type(model.gelu) is torch.nn.GELU and all(type(n) is torchweld.nn.LayerNorm for n in model.norms)
    # The norms are called alike: one timing is good for all.
    assert timed == ["gelu", "dropout", "norms.2"]
    why = {e.name: e.why for e in report.left}
    assert why["gelu"] == "slower here: 2 us, 1 us before"
    timing = {e.name: e.timing for e in report.swapped}
    assert timing["norms.1"] == "1 ms, 3 ms before" and timing["never"] == "not called by example_inputs, not timed"
    assert "(1 ms, 3 ms before)" in str(report) and "left: slower here" in str(report)
    report.undo()
    assert type(model.norms[0]) is torch.nn.LayerNorm and type(model.never) is torch.nn.RMSNorm


@pytest.mark.parametrize("mode", ["training", "inference"])
def test_both_sides_are_timed_and_nothing_else_changes(mode: str) -> None:
    model, x = Model(), torch.randn(4, 16, requires_grad=True)
    buffers, random = [b.clone() for b in model.buffers()], torch.get_rng_state()
    report = torchweld.patch(model, tune=mode, example_inputs={"x": x, "scale": 2.0})
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert x.grad is None and all(p.grad is None for p in model.parameters()) and torch.is_grad_enabled()
    for entry in report.swapped:
        assert entry.name == "never" or "before" in entry.timing
    names = {"norms.0", "norms.1", "norms.2", "gelu", "never", "batch", "dropout"}
    assert {e.name for e in (*report.swapped, *report.left)} == names
    assert not any(m._forward_pre_hooks for m in model.modules())
    expected = [torchweld.nn.LayerNorm if any(e.name == f"norms.{i}" for e in report.swapped) else torch.nn.LayerNorm
                for i in range(3)]  # fmt: skip
    assert [type(n) for n in model.norms] == expected


def test_seconds_are_those_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def step() -> None:
        clock[0] += 2e-3

    monkeypatch.setattr(tune.time, "perf_counter", lambda: clock[0])  # type: ignore[attr-defined]
    assert tune._seconds(step) == pytest.approx(2e-3)


def test_a_model_of_transformers_is_tuned() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(64, (2, 8))
    expected = model(input_ids=ids).logits
    for cached in (True, False):
        report = torchweld.patch(model, tune="training", example_inputs={"input_ids": ids, "use_cache": cached})
        assert len(report.swapped) + len(report.left) >= 8
        # A cache grows with each call, so a layer that is given one is not called again.
        assert any(e.timing == "called with a DynamicCache, not timed" for e in report.swapped) is cached
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        report.undo()


def test_bad_arguments_are_named_and_an_error_of_the_model_leaves_it_unchanged() -> None:
    model, x = Model(), torch.randn(4, 16)
    with pytest.raises(ValueError, match=r"^\[patch\] example_inputs: expected the inputs of one call, beside tune"):
        torchweld.patch(model, tune=True)
    with pytest.raises(
        ValueError, match=r"^\[patch\] tune: expected 'training', 'inference' or a bool, but got 'fast'"
    ):
        torchweld.patch(model, tune="fast", example_inputs=x)
    with pytest.raises(TypeError, match=r"^\[patch\] tune: expected a bool, but got None"):
        torchweld.patch(model, tune=None, example_inputs=x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^\[patch\] example_inputs: expected a tensor, a sequence .* but got int"):
        torchweld.patch(model, tune=True, example_inputs=3)
    with pytest.raises(RuntimeError):
        torchweld.patch(model, tune=True, example_inputs=torch.randn(4, 7))
    assert type(model.gelu) is torch.nn.GELU and type(model.norms[0]) is torch.nn.LayerNorm
