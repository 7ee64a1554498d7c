"""Parameter groups and states from wherever: empty groups, torch's keys alone, flattened checkpoints, odd steps."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from optim_parameters import BF16, PAIRS, parameters, run, set_grads
from torchweld import optim

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@pytest.mark.parametrize(
    "flags", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"zero_grads": True}], ids=str
)
@pytest.mark.parametrize("name", PAIRS)
def test_empty_groups(name: str, flags: dict[str, Any]) -> None:
    ours, theirs = PAIRS[name]
    results = []
    for cls in (ours, theirs):
        params = parameters()
        known = flags if cls is ours else {k: v for k, v in flags.items() if k != "zero_grads"}
        optimizer = cls([{"params": []}, {"params": params}, {"params": []}], lr=0.1, **known)
        results.append(run(optimizer, params))
        cls([{"params": []}, {"params": []}], **known).step()
    torch.testing.assert_close(*results)


def made(cls: type[torch.optim.Optimizer], dtype: torch.dtype, options: dict[str, Any]) -> tuple[torch.nn.Module, Any]:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).to(dtype)
    return model, cls([{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.0}], lr=0.1, **options)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(
    "options",
    [{}, {"max_grad_norm": 1e6}, {"master_weights": True}, {"stochastic_rounding": True}, {"offload": "cpu"}],
    ids=str,
)
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_flattened_checkpoints_go_both_ways(name: str, options: dict[str, Any]) -> None:
    ours, theirs = PAIRS[name]
    narrow = "master_weights" in options or "stochastic_rounding" in options
    for first, second in ((theirs, ours), (ours, theirs), (ours, ours)):
        a, b = (made(cls, BF16 if narrow else torch.float32, options if cls is ours else {}) for cls in (first, second))
        train(*a, 0)
        b[0].load_state_dict(a[0].state_dict())
        saved = get_optimizer_state_dict(*a, options=FLAT)
        saved = {k: v.clone() if isinstance(v, Tensor) else v for k, v in saved.items()}
        if first is theirs and "offload" not in options and "max_grad_norm" not in options and not narrow:
            assert saved.keys() == get_optimizer_state_dict(*b, options=FLAT).keys()
        set_optimizer_state_dict(*b, saved, options=FLAT)
        train(*a, 1)
        train(*b, 1)
        tolerance = 0.02 if narrow else 1e-6
        torch.testing.assert_close(b[0].weight, a[0].weight, atol=tolerance, rtol=tolerance)
        assert b[1].param_groups[1]["weight_decay"] == 0.0


def test_a_group_has_an_option_only_where_it_differs() -> None:
    params = parameters()
    optimizer = optim.AdamW([{"params": params[:2], "max_grad_norm": 2.0}, {"params": params[2:4]}], max_grad_norm=1.0)
    optimizer.add_param_group({"params": params[4:], "max_grad_norm": 1.0})
    assert ["max_grad_norm" in group for group in optimizer.param_groups] == [True, False, False]
    saved = optimizer.state_dict()
    assert [group["max_grad_norm"] for group in saved["param_groups"]] == [2.0, 1.0, 1.0]
    other = optim.AdamW([{"params": params[:2]}, {"params": params[2:4]}, {"params": params[4:]}])
    for each in (saved, other.state_dict(), copy.deepcopy(saved)):
        assert not any("zero_grads" in group for group in each["param_groups"])
    other.load_state_dict(saved)
    for each in (other, copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert [group["max_grad_norm"] for group in each.state_dict()["param_groups"]] == [2.0, 1.0, 1.0]


def test_groups_of_torchs_keys_alone_keep_the_constructors_options() -> None:
    """As wrappers make them, that put groups of their own in place."""
    params = parameters(BF16)
    optimizer = optim.AdamW(params, max_grad_norm=1.0, master_weights=True)
    stock = torch.optim.AdamW(params)
    optimizer.param_groups = stock.param_groups
    run(optimizer, params)
    assert optimizer.grad_norm is not None and "master_param" in optimizer.state[params[0]]


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_amsgrad_switched_on_later_starts_there(name: str) -> None:
    params, others = parameters(), parameters()
    a, b = PAIRS[name][0](params, lr=0.1), PAIRS[name][1](others, lr=0.1, amsgrad=True)
    run(a, params), run(b, others)
    for p, q in zip(params[:-1], others, strict=False):
        with torch.no_grad():
            q.copy_(p)
        b.state[q]["max_exp_avg_sq"].zero_()
    a.param_groups[0]["amsgrad"] = True
    torch.testing.assert_close(run(a, params, range(3, 6)), run(b, others, range(3, 6)))


def test_a_step_by_torch_finds_the_state_as_it_was() -> None:
    """A sparse gradient behind dense ones: their first step is still the first, so dampening does not count."""
    results = []
    for cls in PAIRS["SGD"]:
        params = parameters()
        optimizer = cls(params, lr=0.1, momentum=0.9, dampening=0.5)
        for seed in range(3):
            set_grads(params, seed)
            params[5].grad = params[5].grad.to_sparse()
            optimizer.step()
        results.append([p.detach() for p in params])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("options", [{}, {"master_weights": True}, {"offload": "cpu"}], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_what_is_deleted_is_freed_at_once(monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any]) -> None:
    monkeypatch.setattr("torchweld.optim.offload.is_away", lambda _: True)
    gc.disable()
    try:
        params = parameters(BF16 if "master_weights" in options else torch.float32)
        optimizer = PAIRS[name][0]([{"params": params[:1]}, {"params": params[1:]}], max_grad_norm=1.0, **options)
        run(optimizer, params)
        optimizer.load_state_dict(optimizer.state_dict())
        run(optimizer, params)
        parameter, owner = weakref.ref(params[0]), weakref.ref(optimizer)
        del optimizer.param_groups[0]
        optimizer.state.pop(params.pop(0), None)
        assert parameter() is None
        parameter = weakref.ref(params[0])
        del optimizer, params
        assert parameter() is None and owner() is None
    finally:
        gc.enable()
