"""patch: what is swapped, and that a model never notices more than its speed."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import types
from typing import Any

import pytest
import torch

import torchweld
from patch_models import HEADS, WIDTH, Attention, IndirectAttention, Model, results
from torchweld import backend, nn, ops
from torchweld.nn.twins import TWINS
from torchweld.patching.attention import redirected_methods


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
    inside = ["self_attn", "dropout", "norm1", "norm2", "dropout1", "dropout2"]
    assert names == [
        "layer",
        *(f"layer.{name}" for name in inside),
        "attentions.0",
        "attentions.1",
        "mha",
        "gelu",
        "rms",
        "norm",
    ]
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
    for kind, untouched in (
        ("norms", {"LayerNorm", "RMSNorm", "TransformerEncoderLayer"}),
        ("attention", {"MultiheadAttention", "TransformerEncoderLayer", "Attention", "IndirectAttention"}),
        ("activations", {"GELU"}),
    ):
        report = torchweld.patch(Model(), **{kind: False})
        assert not {e.was.rsplit(".", 1)[-1] for e in report.swapped} & untouched
        assert {e.was.rsplit(".", 1)[-1] for e in report.left} == untouched
        assert {e.why for e in report.left} == {f"patch(..., {kind}=False)"}


def test_nothing_is_swapped_for_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a device has no kernels, the drop-ins would be slower than torch."""
    norms = types.SimpleNamespace(layer_norm_forward=None)
    monkeypatch.setattr(backend, "kernels", {"cpu": norms})
    model = Model()
    report = torchweld.patch(model)
    assert {e.name for e in report.swapped} == {"layer.norm1", "layer.norm2", "rms", "norm"}
    assert {e.why for e in report.left} == {
        f"there are no kernels for {k} on 'cpu'" for k in ("attention", "activations", "dropout")
    }
    with torch.device("meta"):
        assert not torchweld.patch(Model()).left


def test_a_dropout_that_something_watches_is_left() -> None:
    """In place it changes its input, and a subclass is not known."""

    class Own(torch.nn.Dropout):
        pass

    hooked = torch.nn.Dropout(0.5)
    hooked.register_forward_hook(lambda *_: None)
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Dropout(0.5, inplace=True), hooked, Own(0.5))
    report = torchweld.patch(model)
    assert [(e.name, e.now) for e in report.swapped] == [("0", "torchweld.nn.Dropout")]
    assert [e.why for e in report.left] == ["it works in place", "it has hooks", "a subclass of torch.nn.Dropout"]
    x = torch.randn(64, 64)
    for module in (model[0], copy.deepcopy(model[0]), pickle.loads(pickle.dumps(model[0]))):
        torch.manual_seed(3)
        y = module(x)
        torch.manual_seed(3)
        assert torch.equal(y, ops.dropout(x, 0.5))
    report.undo()
    assert type(model[0]) is torch.nn.Dropout
    assert torchweld.patch(model, dropout=False).left[0].why == "patch(..., dropout=False)"


@pytest.mark.parametrize("bad", [None, 3, [torch.nn.LayerNorm(2)]])
def test_what_is_no_module_is_refused(bad: Any) -> None:
    with pytest.raises(TypeError, match=r"\[patch\] model: expected a torch.nn.Module, but got "):
        torchweld.patch(bad)


def test_the_table_has_one_line_for_layers_alike() -> None:
    model = torch.nn.Sequential(*(torch.nn.TransformerEncoderLayer(WIDTH, HEADS) for _ in range(48)))
    report = torchweld.patch(model)
    assert len(report.swapped) == 48 * 7
    lines = str(report).splitlines()
    assert len(lines) == 3 + 7 + 1 and all(len(line) < 160 for line in lines)
    assert [w for w in lines[3].split() if w not in "│|"] == [
        *("*", "x", "48", "torch.nn.TransformerEncoderLayer", "torchweld.nn.TransformerEncoderLayer"),
    ]


def test_attention_calls_are_found() -> None:
    assert set(redirected_methods(Attention)) == set(redirected_methods(IndirectAttention)) == {"forward"}
    assert not redirected_methods(torch.nn.MultiheadAttention)
    assert not redirected_methods(Model), "its parts do, it does not"


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
