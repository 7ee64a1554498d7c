"""patch: what it leaves and why, twice on one model, and undone after the model changed; none of it breaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import torchweld
from patch_models import HEADS, WIDTH, Attention, Model, results
from torchweld import nn


class OwnNorm(torch.nn.LayerNorm):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.float()).to(input.dtype)


class Renamed(torch.nn.LayerNorm):
    pass


class StrangeNorm(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.norm()


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: OwnNorm(WIDTH), "a subclass of torch.nn.LayerNorm with a forward of its own"),
        (lambda: Renamed(WIDTH), "a subclass of torch.nn.LayerNorm"),
        (StrangeNorm, "an unknown layer: torchweld has no drop-in for it"),
        (lambda: torch.nn.BatchNorm1d(WIDTH), "an unknown layer: torchweld has no drop-in for it"),
        (lambda: torch.jit.script(torch.nn.LayerNorm(WIDTH)), "compiled by torch.jit"),
        (lambda: torch.jit.script(torch.nn.Sequential(torch.nn.LayerNorm(WIDTH))), "compiled by torch.jit"),
        (lambda: torch.jit.trace(torch.nn.LayerNorm(WIDTH), torch.zeros(2, WIDTH)), "compiled by torch.jit"),
        (
            lambda: torch.ao.nn.quantized.LayerNorm(WIDTH, *torch.nn.LayerNorm(WIDTH).parameters(), 0.1, 0),
            "a quantised layer",
        ),
        (lambda: torch.ao.nn.quantizable.MultiheadAttention(WIDTH, HEADS), "a quantised layer"),
        (lambda: nn.LayerNorm(WIDTH), "already torchweld's"),
        (
            lambda: torch.nn.utils.parametrizations.weight_norm(torch.nn.LayerNorm(WIDTH), dim=None),
            "a subclass of torch.nn.LayerNorm",
        ),
    ],
)
def test_what_is_left_is_reported_and_works(make: Any, why: str) -> None:
    layer = make()
    model = torch.nn.ModuleDict({"layer": layer})
    kind = type(layer)
    report = torchweld.patch(model)
    assert [(e.name, e.why) for e in report.left if e.name == "layer"] == [("layer", why)]
    assert type(model["layer"]) is kind and f"left: {why}" in str(report)
    if why != "a quantised layer":  # which takes quantised tensors
        assert model["layer"](torch.randn(4, WIDTH)).shape == (4, WIDTH)


def test_a_forward_on_the_instance_stays() -> None:
    model = torch.nn.Sequential(torch.nn.LayerNorm(WIDTH), Attention())
    for module in model:
        module.forward = lambda x: x + 1
    report = torchweld.patch(model)
    assert [e.why for e in report.left] == ["its forward was replaced on the instance"] * 2
    assert torch.equal(model(torch.zeros(3)), torch.full((3,), 2.0))


def test_patching_twice() -> None:
    model = Model()
    before = results(model)
    first = torchweld.patch(model)
    model.extra = torch.nn.LayerNorm(WIDTH)
    second = torchweld.patch(model)
    assert [e.name for e in second.swapped] == ["extra"]
    assert [e.name for e in second.left] == [e.name for e in first.swapped]
    assert {e.why for e in second.left} == {"already torchweld's"}
    assert not first.undo().left and type(model.extra) is nn.LayerNorm
    assert not second.undo().left
    del model.extra
    for got, right in zip(results(model), before, strict=True):
        assert torch.equal(got, right)


def test_undo_after_the_model_changed() -> None:
    model = Model()
    report = torchweld.patch(model)
    gone = model.norm
    model.norm = torch.nn.Identity()  # left the model: whoever holds it gets it back as it was
    torch.nn.utils.parametrizations.weight_norm(model.rms, dim=None)  # has another class now
    model.attentions[0].forward = own = lambda x: x  # was given a forward of its own, which is the user's
    undone = report.undo()
    why = "its class was changed to ParametrizedRMSNorm since"
    assert {e.name: e.why for e in undone.left} == {"rms": why} and why in str(undone)
    assert type(gone) is torch.nn.LayerNorm and type(model.mha) is torch.nn.MultiheadAttention
    assert type(model.attentions[0]) is Attention and model.attentions[0].forward is own
    assert model(torch.randn(2, 7, WIDTH)).isfinite().all()
    torch.nn.utils.parametrize.remove_parametrizations(model.rms, "weight")
    assert [e.name for e in report.undo().swapped] == ["rms"] and type(model.rms) is torch.nn.RMSNorm
