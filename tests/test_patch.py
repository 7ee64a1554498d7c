"""patch: what is swapped, what is left and why, and that a model never notices more than its speed."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.functional import scaled_dot_product_attention as sdpa

import torchweld
from torchweld import nn, ops
from torchweld.nn.twins import TWINS
from torchweld.patching.attention import calls_attention

WIDTH, HEADS = 16, 2


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(WIDTH, 3 * WIDTH)

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.qkv(x).unflatten(-1, (3, HEADS, -1)).movedim(-3, 0).transpose(-2, -3).unbind()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(*self.heads(x), is_causal=True).transpose(-2, -3).flatten(-2)


def helper(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return sdpa(q, k, v, is_causal=True)


class IndirectAttention(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return helper(*self.heads(x)).transpose(-2, -3).flatten(-2)


class OwnNorm(torch.nn.LayerNorm):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.float()).to(input.dtype)


class Renamed(torch.nn.LayerNorm):
    pass


class StrangeNorm(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.norm()


class Model(torch.nn.Module):
    """Something of everything that can be swapped."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 24, 0.0, "gelu", batch_first=True)
        self.attentions = torch.nn.ModuleList([Attention(), IndirectAttention()])
        self.mha = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.gelu = torch.nn.GELU("tanh")
        self.rms, self.norm = torch.nn.RMSNorm(WIDTH), torch.nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(x)
        for attention in self.attentions:
            x = x + attention(self.rms(x))
        return self.norm(self.gelu(self.mha(x, x, x, need_weights=False)[0]))


def results(model: torch.nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    x = torch.linspace(-2, 2, 2 * 7 * WIDTH).view(2, 7, WIDTH)
    out = model(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the name of each op that is called."""
    calls: list[str] = []
    for name in ("layer_norm", "rms_norm", "add_layer_norm", "scaled_dot_product_attention", "gelu"):
        right = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, n=name, f=right, **k: calls.append(n) or f(*a, **k))
    return calls


def test_everything_is_swapped_and_nothing_else_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = Model(), kernels(monkeypatch)
    modules, parameters, state = list(model.modules()), list(model.parameters()), copy.deepcopy(model.state_dict())
    before = results(model)
    assert not calls
    report = torchweld.patch(model)
    names = [e.name for e in report.swapped]
    inside = ["layer", "layer.self_attn", "layer.norm1", "layer.norm2"]
    assert names == [*inside, "attentions.0", "attentions.1", "mha", "gelu", "rms", "norm"]
    assert not report.left
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert repr(state) == repr(model.state_dict())
    after = results(model)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
    expected = {"add_layer_norm": 2, "scaled_dot_product_attention": 4, "gelu": 1, "rms_norm": 2, "layer_norm": 1}
    assert {n: calls.count(n) for n in set(calls)} | {"gelu": calls.count("gelu")} == expected

    undone = report.undo()
    assert [e.name for e in undone.swapped] == names[::-1] and not undone.left
    calls.clear()
    for got, right in zip(results(model), before, strict=True):
        assert torch.equal(got, right)
    assert not calls
    assert not any("forward" in m.__dict__ for m in model.modules())
    again = report.undo()
    assert not again.swapped and not again.left and "nothing" in str(again)


def test_an_optimizer_tied_weights_and_hooks_survive() -> None:
    torch.manual_seed(0)
    losses = []
    for swap in (False, True):
        torch.manual_seed(0)
        model = Model()
        model.norm.weight = model.rms.weight
        seen: list[int] = []
        model.norm.register_forward_hook(lambda m, args, out, seen=seen: seen.append(1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if swap:
            torchweld.patch(model)
        assert model.norm.weight is model.rms.weight
        for _ in range(5):
            loss = results(model)[0].square().mean()
            optimizer.step()
        losses.append(loss)
        assert len(seen) == 5
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)


def test_copies_and_pickles_of_a_patched_model_are_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    torchweld.patch(model)
    before = results(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert twin.attentions[0].forward.args[0] is twin.attentions[0]
        with torch.no_grad():
            model.attentions[0].qkv.weight.add_(1)  # the twin must not look at the original
        for got, right in zip(results(twin), before, strict=True):
            assert torch.equal(got, right)
        with torch.no_grad():
            model.attentions[0].qkv.weight.sub_(1)


def test_the_root_is_swapped_too() -> None:
    model = torch.nn.LayerNorm(WIDTH)
    report = torchweld.patch(model)
    assert type(model) is nn.LayerNorm and "(the model)" in str(report)


def test_only_what_is_asked_for() -> None:
    for options, untouched in (
        ({"norms": False}, {"LayerNorm", "RMSNorm", "TransformerEncoderLayer"}),
        ({"attention": False}, {"MultiheadAttention", "TransformerEncoderLayer", "Attention"}),
        ({"activations": False}, {"GELU"}),
    ):
        swapped = {e.was.rsplit(".", 1)[-1] for e in torchweld.patch(Model(), **options).swapped}
        assert swapped and not swapped & untouched


@pytest.mark.parametrize("bad", [None, 3, [torch.nn.LayerNorm(2)]])
def test_what_is_no_module_is_refused(bad: Any) -> None:
    with pytest.raises(TypeError, match=r"\[patch\] model: expected a torch.nn.Module, but got "):
        torchweld.patch(bad)


# ---- What is left, and why; none of it broken.


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
    model.attentions[0].forward = lambda x: x  # was given another forward
    undone = report.undo()
    assert {e.name: e.why for e in undone.left} == {
        "rms": "its class was changed to ParametrizedRMSNorm since",
        "attentions.0": "its forward was changed since",
    }
    assert type(gone) is torch.nn.LayerNorm and type(model.mha) is torch.nn.MultiheadAttention
    assert "its forward was changed since" in str(undone)
    assert model(torch.randn(2, 7, WIDTH)).isfinite().all()


def test_the_table_has_one_line_for_layers_alike() -> None:
    model = torch.nn.Sequential(*(torch.nn.TransformerEncoderLayer(WIDTH, HEADS) for _ in range(48)))
    start = time.perf_counter()
    report = torchweld.patch(model)
    assert time.perf_counter() - start < 0.1
    assert len(report.swapped) == 48 * 4
    lines = str(report).splitlines()
    assert len(lines) == 3 + 4 and all(len(line) < 160 for line in lines)
    assert [w for w in lines[3].split() if w not in "│|"] == [
        *("*", "x", "48", "torch.nn.TransformerEncoderLayer", "torchweld.nn.TransformerEncoderLayer"),
    ]


def test_attention_calls_are_found() -> None:
    assert calls_attention(Attention) and calls_attention(IndirectAttention)
    assert not calls_attention(torch.nn.MultiheadAttention) and not calls_attention(OwnNorm)
    assert not calls_attention(Model), "its parts do, it does not"


def test_patching_costs_an_import_nothing() -> None:
    program = """
import sys, torch, torchweld
print([m for m in ("rich", "transformers", "torchweld.patching") if m in sys.modules])
torchweld.patch(torch.nn.LayerNorm(2))
print([m for m in ("rich", "transformers", "torchweld.patching") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n['torchweld.patching']\n"


def test_the_twins_of_a_model_compile() -> None:
    model = Model()
    torchweld.patch(model)
    x = torch.randn(2, 7, WIDTH)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    assert set(TWINS.values()) >= {nn.LayerNorm, nn.RMSNorm}
