"""patch: copies, replicas and pickles of a patched model, how long it lives, and whose classes are left alone."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import torchweld
from patch_models import WIDTH, Attention, Model
from torchweld import nn
from torchweld.patching.subclasses import is_swapped, original_of

X = torch.linspace(-2, 2, 2 * 7 * WIDTH).view(2, 7, WIDTH)


def saved(model: torch.nn.Module) -> torch.nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


def shallow(model: torch.nn.Module) -> torch.nn.Module:
    """What copy.copy gives, with modules and parameters of its own: a replica made by hand."""
    twin = copy.copy(model)
    twin._modules = {name: shallow(child) for name, child in model.named_children()}
    twin._parameters = {n: torch.nn.Parameter(p.detach().clone()) for n, p in model.named_parameters(recurse=False)}
    return twin


def replica(model: Any) -> torch.nn.Module:
    """What torch.nn.DataParallel makes for each device."""
    twin: torch.nn.Module = model._replicate_for_data_parallel()
    for name, child in model.named_children():
        twin._modules[name] = replica(child)
    for name, p in model.named_parameters(recurse=False):
        twin._parameters[name] = torch.nn.Parameter(p.detach().clone())
    return twin


def emptied(model: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(model).to("meta").to_empty(device="cpu")


COPIES: list[Callable[[torch.nn.Module], torch.nn.Module]] = [
    copy.deepcopy,
    *(lambda m, p=p: pickle.loads(pickle.dumps(m, p)) for p in (2, pickle.HIGHEST_PROTOCOL)),
    saved,
    shallow,
    replica,
    emptied,
    lambda m: torch.optim.swa_utils.AveragedModel(m).module,
]


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_is_patched_and_computes_with_what_is_its_own(copied: Callable[..., torch.nn.Module]) -> None:
    model = Model()
    torchweld.patch(model)
    twin = copied(model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    for p in twin.parameters():
        torch.nn.init.zeros_(p)
    for got, right in zip(twin.attentions, model.attentions, strict=True):
        assert not got(X).any() and right(X).any()
    assert not twin(X).any() and model(X).any()


def test_functional_calls_and_stacked_states() -> None:
    models = [Model() for _ in range(3)]
    for model in models:
        torchweld.patch(model)
    expected = torch.stack([m(X) for m in models])
    base = copy.deepcopy(models[0]).to("meta")
    states = torch.func.stack_module_state(models)
    got = torch.vmap(lambda p, b: torch.func.functional_call(base, (p, b), (X,)))(*states)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_pickle_is_patched_in_another_process(tmp_path: Path) -> None:
    model = Model()
    torchweld.patch(model)
    (tmp_path / "model").write_bytes(pickle.dumps((model, X, model(X).detach())))
    program = """
import pickle, sys, torch
model, x, expected = pickle.load(open(sys.argv[1], "rb"))
torch.testing.assert_close(model(x), expected)
print(type(model.norm).__module__, *(type(m).__mro__[1].__name__ for m in (model.attentions[0], model.gelu)))
"""
    command = [sys.executable, "-c", program, str(tmp_path / "model")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout == "torchweld.nn.layer_norm Swapped Swapped\n", done.stderr


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def test_a_deleted_model_is_freed_at_once_and_a_report_does_not_keep_it(no_collector: None) -> None:
    model = Model()
    report = torchweld.patch(model)
    model(X).sum().backward()
    parts = [weakref.ref(part) for part in (*model.modules(), *model.parameters())]
    assert report.model is model
    del model
    assert not [part for part in parts if part() is not None]
    undone = report.undo()
    assert report.model is None and not undone.swapped and {e.why for e in undone.left} == {"it was deleted since"}


def test_a_class_goes_with_its_last_module() -> None:
    def make() -> Any:
        class Local(Attention):
            pass

        return Local()

    module = make()
    torchweld.patch(module)
    module(X)
    classes = [weakref.ref(cls) for cls in (type(module), original_of(type(module)))]
    del module
    gc.collect()
    assert [cls() for cls in classes] == [None, None]


def test_a_swapped_class_is_one_for_all_and_nobody_registers_it() -> None:
    registry: list[str] = []

    class Base(torch.nn.Module):
        def __init_subclass__(cls, **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            registry.append(cls.__name__)

    class Leaf(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    a, b = Leaf(), Leaf()
    torchweld.patch(a)
    torchweld.patch(b)
    assert type(a) is type(b) is not Leaf and isinstance(a, Leaf) and repr(a) == repr(Leaf())
    assert registry == ["Leaf"]
    type("Other", (type(a),), {})
    assert registry == ["Leaf", "Other"], "a subclass of the user's own is one again"
    assert is_swapped(type(type(a)())), "what is made of a module's class is what the module is"


def test_parametrized_pruned_and_retyped() -> None:
    model, plain = Model(), Model()
    plain.load_state_dict(model.state_dict())
    torchweld.patch(model)
    for m in (model, plain):
        torch.nn.utils.parametrizations.weight_norm(m.attentions[0].qkv)
        m.attentions[1].qkv.weight.requires_grad_(False)
        m.bfloat16().float()
    torch.testing.assert_close(model(X), plain(X), rtol=1e-3, atol=1e-4)
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict())
    assert type(model.norm) is nn.LayerNorm and is_swapped(type(model.attentions[0]))
