"""The optimizers' masters, stochastic rounding, zeroed gradients and offload: training, checkpoints, refusals."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from optim_parameters import BF16, F32, PAIRS, parameters, run, set_grads, states
from torchweld import optim
from torchweld.optim import offload

OPTIONS = [{"master_weights": True}, {"stochastic_rounding": True}, {"master_weights": True, "amsgrad": True}]


def loaded(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its state_dict after a journey through a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_masters_train_as_fp32_parameters_do(name: str, dtype: torch.dtype) -> None:
    ours, theirs = PAIRS[name]
    narrow, wide = parameters(dtype), [torch.nn.Parameter(p.detach().float()) for p in parameters(dtype)]
    a, b = ours(narrow, lr=1e-3, master_weights=True), theirs(wide, lr=1e-3)
    for seed in range(5):
        set_grads(narrow, seed)
        for p, q in zip(narrow, wide, strict=True):
            q.grad = None if p.grad is None else p.grad.float()
        a.step()
        b.step()
    for p, q in zip(narrow[:-1], wide, strict=False):
        torch.testing.assert_close(a.state[p]["master_param"], q.detach())
        assert torch.equal(p, a.state[p]["master_param"].to(dtype))
    assert all(t.dtype == F32 for s in states(a, narrow) for t in s.values())


def test_small_updates_count_only_where_they_can() -> None:
    """An update of a 256th of an ulp, 2000 times: lost without masters, right with them, right on average at random."""
    moved = {}
    for name, options in (("nearest", {}), ("master", OPTIONS[0]), ("random", OPTIONS[1])):
        p = torch.nn.Parameter(torch.ones(4096, dtype=BF16))
        optimizer = optim.AdamW([p], lr=2**-16, weight_decay=0.0, **options)
        for _ in range(2000):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved[name] = 1 - float(p.detach().double().mean())
    expected = 2000 * 2**-16
    assert moved["nearest"] == 0 and abs(moved["master"] - expected) < 2**-8
    assert abs(moved["random"] - expected) < 0.01 * expected


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_resumed_run_continues_to_the_bit(options: dict[str, Any]) -> None:
    params = parameters(BF16)
    optimizer = optim.AdamW([{"params": params[:2], "weight_decay": 0.0}, {"params": params[2:]}], **options)
    run(optimizer, params)
    others = copy.deepcopy(params)
    resumed = optim.AdamW(
        [{"params": others[:2]}, {"params": others[2:]}], lr=123.0
    )  # the checkpoint knows the options
    resumed.load_state_dict(loaded(optimizer))
    copied_params, copied = copy.deepcopy((params, optimizer))
    with torch.no_grad():  # the model is restored after the optimizer: its masters keep their low bits
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    expected = run(optimizer, params, range(3, 6))
    for found in (run(resumed, others, range(3, 6)), run(copied, copied_params, range(3, 6))):
        assert all(torch.equal(p, q) for p, q in zip(found, expected, strict=True))
    for s, t in zip(states(optimizer, params), states(resumed, others), strict=True):
        assert all(torch.equal(s[n], t[n]) and s[n].dtype == t[n].dtype for n in s)


@pytest.mark.parametrize("name", PAIRS)
def test_masters_and_torchs_checkpoints(name: str) -> None:
    ours, theirs = PAIRS[name]
    kwargs = {"momentum": 0.9} if name == "SGD" else {}
    params = parameters(BF16)
    a = ours(params, master_weights=True, **kwargs)
    run(a, params)
    b = theirs(params, **kwargs)
    b.load_state_dict(loaded(a))  # what it does not know does not disturb it
    run(b, params, range(3, 5))

    c = ours(params, master_weights=True, **kwargs)
    c.load_state_dict(loaded(theirs_after(theirs, params, kwargs)))
    assert c.state_dict()["param_groups"][0]["master_weights"]
    before = [p.detach().clone() for p in params]
    run(c, params, range(5, 6))
    for p, old, state in zip(params, before, states(c, params), strict=False):
        assert all(t.dtype == F32 for t in state.values())
        assert torch.equal(p, state["master_param"].to(BF16)) and (p.numel() == 0 or not torch.equal(p, old))


def theirs_after(
    cls: type[torch.optim.Optimizer], params: list[torch.nn.Parameter], kwargs: dict[str, Any]
) -> torch.optim.Optimizer:
    copies = copy.deepcopy(params)
    optimizer = cls(copies, lr=0.1, **kwargs)
    run(optimizer, copies)
    return optimizer


def test_a_master_follows_what_others_write() -> None:
    params = parameters(BF16)
    optimizer = optim.AdamW(params, lr=1e-3, master_weights=True)
    run(optimizer, params)
    master = optimizer.state[params[0]]["master_param"].clone()
    with torch.no_grad():
        params[0][2, 3] = 100.0
    run(optimizer, params, range(3, 4))
    found = optimizer.state[params[0]]["master_param"]
    assert abs(float(found[2, 3]) - 100) < 1
    kept = torch.ones(5, 7, dtype=torch.bool)
    kept[2, 3] = False
    assert float((found - master)[kept].abs().max()) < 2e-3  # a step of 1e-3 from the low bits it had


@pytest.mark.parametrize("name", PAIRS)
def test_gradients_are_zeroed(name: str) -> None:
    ours, _ = PAIRS[name]
    zeroed, plain = parameters(), parameters()
    a, b = ours(zeroed, zero_grads=True, max_grad_norm=0.5), ours(plain, max_grad_norm=0.5)
    for seed in range(2):
        set_grads(zeroed, seed), set_grads(plain, seed)
        a.step(), b.step()
        assert not any(p.grad.any() for p in zeroed[:-1])
    assert all(torch.equal(p, q) for p, q in zip(zeroed, plain, strict=True))


@pytest.mark.parametrize("away", [False, True], ids=["beside", "mirrored"])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, *OPTIONS], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_offloaded_steps_are_the_same(
    monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any], away: bool
) -> None:
    """On the CPU there is nothing to copy; `away` takes the road of a GPU's parameters all the same."""
    monkeypatch.setattr(offload, "is_away", lambda _: away)
    monkeypatch.setattr(offload, "_BUCKET_BYTES", 256)
    ours, _ = PAIRS[name]
    if name == "SGD":
        options = {k: v for k, v in options.items() if k not in ("amsgrad", "stochastic_rounding")} | {"momentum": 0.9}
    dtype = BF16 if "master_weights" in options else F32
    there, here = parameters(dtype), parameters(dtype)
    a, b = ours(there, offload="cpu", **options), ours(here, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    for seed in range(4):
        versions = [p._version for p in there[:-1]]
        for params, optimizer in ((there, a), (here, b)):
            set_grads(params, seed, 4.0)
            if seed == 2:
                params[1].grad[3] = math.inf
            scaler.step(optimizer)
            scaler._per_optimizer_states.clear()
            if seed == 0:
                with torch.no_grad():
                    params[0].mul_(2)  # somebody else writes
        if seed != 2:
            assert all(p._version > v for p, v in zip(there, versions, strict=False))
    assert all(torch.equal(p, q) for p, q in zip(there, here, strict=True))
    assert (a.grad_norm is None) == (b.grad_norm is None)
    for s, t in zip(states(a, there), states(b, here), strict=True):
        assert s.keys() == t.keys() and all(torch.equal(s[n], t[n]) for n in s)
    other = ours(parameters(dtype), offload="cpu")
    other.load_state_dict(loaded(b))
    assert all(t.is_cpu for s in other.state.values() for t in s.values())


@pytest.mark.parametrize(
    ("dtype", "options", "message"),
    [
        (F32, {"offload": "disk"}, "Invalid offload value: 'disk'; expected 'cpu', or None"),
        (BF16, {"master_weights": True, "stochastic_rounding": True}, "expected at most one"),
        (torch.float16, {"stochastic_rounding": True}, "expected bfloat16 parameters, or wider ones, but got float16"),
        (BF16, {"master_weights": True, "foreach": True}, "expected foreach=False or None, but got True"),
        (BF16, {"stochastic_rounding": True, "differentiable": True}, "expected differentiable=False or None"),
        (F32, {"offload": "cpu", "capturable": True}, "expected capturable=False or None"),
    ],
)
def test_what_does_not_go_together_is_refused(dtype: torch.dtype, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.AdamW(parameters(dtype), **options)
    if "offload" not in options:
        optimizer = optim.AdamW([torch.nn.Parameter(torch.zeros(3))])
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": parameters(dtype), **options})


def test_masters_are_not_silently_dropped() -> None:
    params = parameters(BF16)
    optimizer = optim.AdamW(params, betas=(torch.tensor(0.9), torch.tensor(0.99)), foreach=False, master_weights=True)
    set_grads(params, 0)
    with pytest.raises(RuntimeError, match=r"\[AdamW\] master_weights=True cannot serve betas given as tensors"):
        optimizer.step()


def test_mixed_groups_keep_their_own_ways() -> None:
    """fp32 parameters beside 16-bit ones; one group with masters, one without."""
    made: list[Tensor] = [p.detach() for p in (*parameters(BF16)[:2], *parameters()[:2])]
    params = [torch.nn.Parameter(t) for t in (*made, made[0].clone())]
    optimizer = optim.AdamW([{"params": params[:4], "master_weights": True}, {"params": params[4:]}])
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert ["master_param" in optimizer.state[p] for p in params] == [True, True, False, False, False]
    assert optimizer.state[params[4]]["exp_avg"].dtype == BF16
