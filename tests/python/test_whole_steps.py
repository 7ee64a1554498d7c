"""Whole steps, in which an optimizer crosses into C++ once: the same bits, and only where the step is a common one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import torchweld
from optim_parameters import BF16, F32, F64, parameters, set_grads, states
from torchweld import optim

OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "AdamW": ({}, {"amsgrad": True, "eps": 1e-6}, {"maximize": True, "weight_decay": 0.2}, {"fused": True}),
    "Adam": ({}, {"weight_decay": 0.1}, {"decoupled_weight_decay": True, "betas": (0.5, 0.75)}, {"lr": 1}),
    "SGD": ({}, {"momentum": 0.9}, {"momentum": 0.5, "nesterov": True, "weight_decay": 0.1}, {"maximize": True}),
}
CASES = [(name, options) for name, each in OPTIONS.items() for options in each]


def two_groups(name: str, params: list[torch.nn.Parameter], **options: Any) -> Any:
    groups = [{"params": params[:2], "lr": 0.02, "weight_decay": 0.3}, {"params": params[2:]}]
    return getattr(optim, name)(groups, **options)


def tensors(optimizer: Any, params: list[torch.nn.Parameter]) -> list[Tensor]:
    return [*params, *(t for state in states(optimizer, params) for t in state.values() if t is not None)]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_bits_are_those_of_the_way_through_python(
    monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    found, expected = parameters(dtype), parameters(dtype)
    whole, slow = (two_groups(name, each, **options) for each in (found, expected))
    monkeypatch.setattr(slow, "_whole", lambda *_: None)
    for seed in range(4):
        for params, optimizer in ((found, whole), (expected, slow)):
            set_grads(params, seed)
            if seed == 2:
                params[1].grad = None  # its count of steps stays behind
                optimizer.param_groups[1]["lr"] /= 2  # as a scheduler does
            optimizer.step()
    written = whole._whole(whole.param_groups, whole.state, whole.defaults)
    slow.step()
    assert written is not None
    for a, b in zip(tensors(whole, found), tensors(slow, expected), strict=True):
        assert a.dtype is b.dtype and torch.equal(a, b)
    assert all(t in {id(w) for w in written} for t in map(id, tensors(whole, found)[: len(found) - 1]))


def test_versions_are_counted() -> None:
    params = parameters()
    optimizer = two_groups("AdamW", params)
    for seed in range(2):
        set_grads(params, seed)
        before = [t._version for t in tensors(optimizer, params[:-1])]
        optimizer.step()
        after = [t._version for t in tensors(optimizer, params[:-1])]
    assert all(a > b for a, b in zip(after, before, strict=True))


Change = Callable[[Any, list[torch.nn.Parameter]], Any]


def served(change: Change, context: Any = None, name: str = "AdamW") -> bool:
    """Whether the second step is whole after `change`; asserts that one that is not has changed nothing."""
    params = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]
    optimizer = getattr(optim, name)(params, momentum=0.9) if name == "SGD" else getattr(optim, name)(params)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    with torch.no_grad():
        change(optimizer, params)
    with context or torch.no_grad():
        before = [t.clone() for t in params]
        written = optimizer._whole(optimizer.param_groups, optimizer.state, optimizer.defaults)
        if written is None:
            assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    return written is not None


class Odd(torch.nn.Parameter):
    """A subclass of a parameter, which torch's own step serves."""


def _nothing(*_: Any) -> None:
    """A step as usual."""


def _group(**options: Any) -> Change:
    return lambda optimizer, _: optimizer.param_groups[0].update(options)


def _default(**options: Any) -> Change:
    return lambda optimizer, _: optimizer.defaults.update(options)


def _state(name: str, make: Callable[[Tensor], Any]) -> Change:
    def change(optimizer: Any, params: list[torch.nn.Parameter]) -> None:
        optimizer.state[params[1]][name] = make(optimizer.state[params[1]][name])

    return change


def _param(make: Callable[[torch.nn.Parameter], Any]) -> Change:
    def change(optimizer: Any, params: list[torch.nn.Parameter]) -> None:
        new = make(params[1])
        new.grad = torch.randn_like(new)
        optimizer.state[new] = optimizer.state[params[1]]
        optimizer.param_groups[0]["params"] = [params[0], new]

    return change


OPTIONS_OF_A_GROUP: tuple[dict[str, Any], ...] = (
    {"foreach": True},
    {"differentiable": True},
    {"capturable": True},
    {"master_weights": True},
    {"zero_grads": True},
    {"max_grad_norm": 1.0},
    {"maximize": 1},
    {"lr": torch.tensor(1e-3)},
    {"lr": float("nan")},
    {"weight_decay": torch.tensor(0.1)},
    {"eps": -1.0},
    {"betas": [0.9, 0.9]},
    {"betas": (0.9, 1.0)},
    {"params": ()},
)
UNCOMMON: dict[str, Change] = {
    **{f"a group with {options}": _group(**options) for options in OPTIONS_OF_A_GROUP},
    "a default max_grad_norm": _default(max_grad_norm=1.0),
    "a default offload": _default(offload="cpu"),
    "no state": lambda optimizer, params: optimizer.state.pop(params[1]),
    "a moment that is None": _state("exp_avg", lambda _: None),
    "a moment of another shape": _state("exp_avg", lambda t: torch.zeros(4)),
    "a moment of float64": _state("exp_avg_sq", Tensor.double),
    "a moment on another device": _state("exp_avg", lambda t: t.to("meta")),
    "a step of float64": _state("step", Tensor.double),
    "a step that is a number": _state("step", float),
    "a parameter of a subclass": _param(lambda p: Odd(p.detach().clone())),
    "a parameter of float64": _param(lambda p: torch.nn.Parameter(p.detach().double())),
    "a parameter with gaps": _param(lambda p: torch.nn.Parameter(torch.randn(10)[::2])),
    "parameters that share memory": lambda _, params: setattr(params[1], "data", params[0].detach().view(-1)[:5]),
    "a sparse gradient": lambda _, params: setattr(params[1], "grad", torch.ones(5).to_sparse()),
}
CONTEXTS: dict[str, Callable[[], Any]] = {
    "a function mode": lambda: torch.device("cpu"),
    "another backend": lambda: torchweld.use_backend("reference"),
    "a profiler": torch.profiler.profile,
}


@pytest.mark.parametrize("what", [*UNCOMMON, *CONTEXTS])
def test_what_is_not_common_is_left_to_python(what: str) -> None:
    assert not (served(UNCOMMON[what]) if what in UNCOMMON else served(_nothing, CONTEXTS[what]()))


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_common_is_whole(name: str) -> None:
    assert served(_nothing, name=name)


def test_an_interrupt_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Tensor) -> int:
        raise KeyboardInterrupt

    params = [torch.nn.Parameter(torch.randn(3))]
    params[0].grad = torch.ones(3)
    optimizer = optim.SGD(params, momentum=0.9)
    optimizer.step()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Tensor, "__hash__", interrupted)
        optimizer._whole(optimizer.param_groups, optimizer.state, optimizer.defaults)


def test_steps_in_float64_are_served_as_before() -> None:
    params = parameters(F64)
    optimizer = two_groups("AdamW", params)
    for seed in range(2):
        set_grads(params, seed)
        optimizer.step()
    assert all(s["step"] == 2 for s in states(optimizer, params[:-1]))
