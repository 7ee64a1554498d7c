"""optim.AdamW and optim.Adam against torch's own, step by step; their arguments and checkpoints."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch

from optim_parameters import F32, PAIRS, parameters, run
from torchweld import optim

# What torch's constructors do not have.
EXTRA = {"max_grad_norm", "master_weights", "stochastic_rounding", "zero_grads", "offload"}


@pytest.mark.parametrize("name", PAIRS)
def test_signature_and_state_dict_are_torchs(name: str) -> None:
    ours, theirs = PAIRS[name]
    mine, torchs = (inspect.signature(cls).parameters for cls in (ours, theirs))
    known = [p.replace(annotation="") for n, p in mine.items() if n not in EXTRA]
    assert known == [p.replace(annotation="") for p in torchs.values()]
    assert issubclass(ours, theirs)
    a, b = ours(parameters()), theirs(parameters())
    run(a, a.param_groups[0]["params"]), run(b, b.param_groups[0]["params"])
    mine, torchs = a.state_dict(), b.state_dict()
    assert set(mine["param_groups"][0]) == set(torchs["param_groups"][0]) == set(a.param_groups[0])
    assert {k: set(v) for k, v in mine["state"].items()} == {k: set(v) for k, v in torchs["state"].items()}
    steps = [s["step"] for s in mine["state"].values() if "step" in s]
    assert all(s.shape == () and s.dtype == F32 and s.is_cpu for s in steps)


@pytest.mark.parametrize(
    ("name", "options"),
    [("Adam", {}), ("AdamW", {"amsgrad": True}), ("SGD", {}), ("SGD", {"momentum": 0.9, "dampening": 0.5})],
)
def test_checkpoints_go_both_ways(name: str, options: dict[str, Any]) -> None:
    ours, theirs = PAIRS[name]
    expected = run(theirs(p := parameters(), **options), p, range(6))
    for first, second in ((ours, theirs), (theirs, ours)):
        params = parameters()
        before = first(params, **options)
        run(before, params)
        file = io.BytesIO()
        torch.save(before.state_dict(), file)
        file.seek(0)
        after = second(params, lr=123.0, **({"max_grad_norm": 1e6} if second is ours else {}))
        after.load_state_dict(torch.load(file, weights_only=True))
        torch.testing.assert_close(run(after, params, range(3, 6)), expected)
        if second is ours:
            assert after.state_dict()["param_groups"][0]["max_grad_norm"] == 1e6  # torch's checkpoint does not know it


def test_copies_and_pickles_continue_alike() -> None:
    params = parameters()
    optimizer = optim.AdamW([{"params": params[:2], "weight_decay": 0.0}, {"params": params[2:]}], max_grad_norm=0.5)
    run(optimizer, params)
    copies = [copy.deepcopy((params, optimizer)), pickle.loads(pickle.dumps((params, optimizer)))]
    expected = run(optimizer, params, range(3, 6))
    for other_params, other in copies:
        assert other.__dict__.keys() >= {k for k in optimizer.__dict__ if not k.startswith("_")}
        assert all(torch.equal(a, b) for a, b in zip(run(other, other_params, range(3, 6)), expected, strict=True))


def test_a_step_that_is_a_number_is_loaded() -> None:
    a, b = parameters(), parameters()
    optimizer, expected = optim.AdamW(a), run(optim.AdamW(b), b, range(4))
    run(optimizer, a)
    old = optimizer.state_dict()
    for state in old["state"].values():
        state["step"] = state["step"].item()
    optimizer.load_state_dict(old)
    torch.testing.assert_close(run(optimizer, a, range(3, 4)), expected)
