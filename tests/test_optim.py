"""optim.AdamW and optim.Adam against torch's own, step by step; their arguments and checkpoints."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    _get_optim_inputs_including_global_cliquey_kwargs,
    optim_db,
)

from optim_parameters import BF16, F32, F64, PAIRS, parameters, run, set_grads, states
from torchweld import optim

INFOS = {name: next(o for o in optim_db if o.optim_cls is theirs) for name, (_, theirs) in PAIRS.items()}
INPUTS = {name: _get_optim_inputs_including_global_cliquey_kwargs("cpu", F32, info) for name, info in INFOS.items()}
CONFIGS = [(name, i.kwargs) for name, found in INPUTS.items() for i in found]
ERRORS = [(name, e) for name, info in INFOS.items() for e in info.optim_error_inputs_func("cpu", F32)]
# torch's for-loop rounds to bf16 after every operation, ours once per stored value.
TOLERANCE: dict[torch.dtype, dict[str, float]] = {F64: {}, F32: {}, BF16: {"rtol": 1.6e-2, "atol": 1e-3}}


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize(("name", "kwargs"), CONFIGS)
def test_lockstep_with_torchs_loop(name: str, kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    ours, theirs = PAIRS[name]
    mine, its = parameters(dtype), parameters(dtype)
    if kwargs.get("differentiable"):
        mine, its = ([p.detach() for p in each] for each in (mine, its))  # in place on what needs a gradient: refused
    a = ours(mine, **kwargs)
    b = theirs(its, **{**kwargs, "fused": False, "foreach": False})
    for seed in range(7):
        for params, optimizer in ((mine, a), (its, b)):
            set_grads(params, seed)
            optimizer.step()
        torch.testing.assert_close(mine, its, **TOLERANCE[dtype])
        for left, right in zip(states(a, mine), states(b, its), strict=True):
            assert left.keys() == right.keys()
            for key, value in right.items():
                torch.testing.assert_close(left[key], value, **TOLERANCE[dtype])
                assert left[key].stride() == value.stride()
        with torch.no_grad():  # aligned again, so that rounding does not add up
            for p, q in zip(mine, its, strict=True):
                p.copy_(q)
            for left, right in zip(states(a, mine), states(b, its), strict=True):
                for key, value in right.items():
                    left[key].copy_(value)


@pytest.mark.parametrize(("name", "error"), ERRORS, ids=lambda e: getattr(e, "error_regex", e))
def test_the_same_arguments_are_refused(name: str, error: Any) -> None:
    wrong = error.optimizer_error_input
    params = parameters() if wrong.params is None else wrong.params
    expectation = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
    with expectation(error.error_type, match=error.error_regex):
        optimizer = PAIRS[name][0](params, **wrong.kwargs)
        if error.error_on == OptimizerErrorEnum.STEP_ERROR:
            optimizer.step()


@pytest.mark.parametrize("name", PAIRS)
def test_signature_and_state_dict_are_torchs(name: str) -> None:
    ours, theirs = PAIRS[name]
    mine, torchs = (inspect.signature(cls).parameters for cls in (ours, theirs))
    assert [p.replace(annotation="") for p in mine.values()][:-1] == [p.replace(annotation="") for p in torchs.values()]
    assert list(mine)[-1] == "max_grad_norm"
    assert issubclass(ours, theirs)
    a, b = ours(parameters()), theirs(parameters())
    run(a, a.param_groups[0]["params"]), run(b, b.param_groups[0]["params"])
    mine, torchs = a.state_dict(), b.state_dict()
    assert set(mine["param_groups"][0]) == {*torchs["param_groups"][0], "max_grad_norm"}
    assert {k: set(v) for k, v in mine["state"].items()} == {k: set(v) for k, v in torchs["state"].items()}
    assert all(s["step"].shape == () and s["step"].dtype == F32 and s["step"].is_cpu for s in mine["state"].values())


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_checkpoints_go_both_ways(name: str, amsgrad: bool) -> None:
    ours, theirs = PAIRS[name]
    expected = run(theirs(p := parameters(), amsgrad=amsgrad), p, range(6))
    for first, second in ((ours, theirs), (theirs, ours)):
        params = parameters()
        before = first(params, amsgrad=amsgrad)
        run(before, params)
        file = io.BytesIO()
        torch.save(before.state_dict(), file)
        file.seek(0)
        after = second(params, lr=123.0, **({"max_grad_norm": 1e6} if second is ours else {}))
        after.load_state_dict(torch.load(file, weights_only=True))
        torch.testing.assert_close(run(after, params, range(3, 6)), expected)
        if second is ours:
            assert after.param_groups[0]["max_grad_norm"] == 1e6  # torch's checkpoint does not know it


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
