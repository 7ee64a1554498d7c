"""torch's own data base of optimizers, every entry of Adam, AdamW and SGD, run against ours beside torch's for-loop.

Nothing is skipped but what torch's data base marks as needing a GPU (capturable), which runs where there is one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    OptimizerInfo,
    _get_optim_inputs_including_global_cliquey_kwargs,
    optim_db,
)

from optim_parameters import BF16, F32, F64, PAIRS, parameters, set_grads, states
from torchweld import backend

F16, C64, C128 = torch.float16, torch.complex64, torch.complex128
INFOS: dict[str, OptimizerInfo] = {
    name: next(o for o in optim_db if o.optim_cls is theirs) for name, (_, theirs) in PAIRS.items()
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
NARROW = (BF16, F16)


def configurations(device: str) -> list[tuple[str, dict[str, Any]]]:
    if device == "cuda" and backend.unavailable("cuda"):
        return []
    return [
        (name, found.kwargs)
        for name, info in INFOS.items()
        for found in _get_optim_inputs_including_global_cliquey_kwargs(device, F32, info)
    ]


def errors(device: str) -> list[tuple[str, Any]]:
    if device == "cuda" and backend.unavailable("cuda"):
        return []
    return [(name, e) for name, info in INFOS.items() for e in info.optim_error_inputs_func(device, F32)]


CASES = [pytest.param("cpu", *c, id=f"{c[0]}-{c[1]}") for c in configurations("cpu")] + [
    pytest.param("cuda", *c, id=f"cuda-{c[0]}-{c[1]}", marks=pytest.mark.cuda) for c in configurations("cuda")
]


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """torch's own tolerances; in 16 bits, where its loop rounds after every operation and ours once, a few ulps."""
    options = {}
    if theirs.dtype in NARROW and theirs.numel():
        eps = torch.finfo(theirs.dtype).eps
        options = {"rtol": 2 * eps, "atol": 2 * eps * float(theirs.detach().abs().max())}
    torch.testing.assert_close(ours, theirs, check_device=False, **options)


def on(device: str, dtype: torch.dtype, differentiable: bool = False) -> list[Any]:
    params = [p.detach().to(device) for p in parameters(dtype)]
    # A leaf that needs a gradient cannot be written to in place under differentiable=True.
    return params if differentiable else [torch.nn.Parameter(p) for p in params]


def lockstep(a: torch.optim.Optimizer, b: torch.optim.Optimizer, mine: list[Any], its: list[Any], steps: int) -> None:
    """Both take `steps` steps; after each, parameters and state agree, and are then made equal."""
    for seed in range(steps):
        for params, optimizer in ((mine, a), (its, b)):
            set_grads(params, seed)
            optimizer.step()
        for p, q in zip(mine, its, strict=True):
            assert_close(p, q)
        for left, right in zip(states(a, mine), states(b, its), strict=True):
            assert left.keys() == right.keys()
            for key, value in right.items():
                assert_close(left[key], value)
                assert left[key].stride() == value.stride()
        with torch.no_grad():  # aligned again, so that rounding does not add up
            for p, q in zip(mine, its, strict=True):
                p.copy_(q)
            for left, right in zip(states(a, mine), states(b, its), strict=True):
                for key, value in right.items():
                    left[key].copy_(value)


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64, C64, C128], ids=str)
@pytest.mark.parametrize(("device", "name", "kwargs"), CASES)
def test_lockstep_with_torchs_loop(device: str, name: str, kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    ours, theirs = PAIRS[name]
    if dtype == F16 and name != "SGD":
        # In float16 torch's eps of 1e-8 is 0 and the square of a small gradient loses its bits: an eps far above both.
        kwargs = {**kwargs, "eps": 1.0}
    plain = kwargs.get("differentiable", False)
    mine, its = on(device, dtype, plain), on(device, dtype, plain)
    kwargs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    a = ours(mine, **copy.deepcopy(kwargs))
    if kwargs.get("fused") and dtype.is_complex:
        for optimizer, params in ((a, mine), (theirs(its, **copy.deepcopy(kwargs)), its)):
            set_grads(params, 0)
            with pytest.raises(RuntimeError, match="`fused=True` requires all the params to be floating point"):
                optimizer.step()
        return
    b = theirs(its, **{**copy.deepcopy(kwargs), "fused": False, "foreach": False})
    lockstep(a, b, mine, its, 4)


@pytest.mark.parametrize(("name", "error"), errors("cpu"), ids=lambda e: getattr(e, "error_regex", e))
def test_the_same_arguments_are_refused(name: str, error: Any) -> None:
    wrong = error.optimizer_error_input
    params = parameters() if wrong.params is None else wrong.params
    expectation = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
    with expectation(error.error_type, match=error.error_regex):
        optimizer = PAIRS[name][0](params, **wrong.kwargs)
        if error.error_on == OptimizerErrorEnum.STEP_ERROR:
            optimizer.step()


@pytest.mark.parametrize(
    ("name", "schedulers"),
    [(n, s) for n, i in INFOS.items() for s in (*i.scheduler_inputs, [])]
    if hasattr(INFOS["SGD"], "scheduler_inputs")
    else [],
)
def test_schedulers_lead_to_the_same_place(name: str, schedulers: list[Callable[[Any], Any]]) -> None:
    found = []
    for cls in PAIRS[name]:
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 50).view(10, 5))
        bias = torch.nn.Parameter(torch.linspace(0, 1, 10))
        optimizer = cls([{"params": [weight]}, {"params": [bias], "lr": 1e-2}], lr=1e-3)
        made = [each(optimizer) for each in schedulers]
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = (weight.mv(torch.linspace(1, 2, 5)) + bias).square().sum()
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            for scheduler in made:
                args = (loss.item(),) if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else ()
                scheduler.step(*args)
        assert losses[-1] < losses[0]
        found.append([weight, bias, torch.tensor(losses)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", PAIRS)
def test_older_checkpoints_and_steps_without_gradients(name: str) -> None:
    ours, _ = PAIRS[name]
    optimizer = ours(params := parameters())
    set_grads(params, 0)
    optimizer.step()
    old = copy.deepcopy(optimizer.state_dict())
    added = {"maximize", "fused", "foreach", "differentiable", "capturable", "amsgrad", "max_grad_norm", "zero_grads"}
    for group in old["param_groups"]:
        for flag in added & group.keys():
            del group[flag]
    optimizer.load_state_dict(old)
    set_grads(params, 1)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


# ---- Beyond the data base's tiny shapes

SIZES = st.lists(st.one_of(st.integers(0, 200), st.integers(1000, 70_000)), min_size=1, max_size=6)
OPTIONS = {
    "Adam": st.fixed_dictionaries({"weight_decay": st.sampled_from([0.0, 0.1]), "amsgrad": st.booleans()}),
    "AdamW": st.fixed_dictionaries({"weight_decay": st.sampled_from([0.0, 0.1]), "amsgrad": st.booleans()}),
    "SGD": st.fixed_dictionaries(
        {
            "momentum": st.sampled_from([0.0, 0.9]),
            "dampening": st.sampled_from([0.0, 0.5]),
            "weight_decay": st.just(0.1),
        }
    ),
}


@pytest.mark.parametrize("name", PAIRS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_large_and_odd_lists(name: str, data: st.DataObject) -> None:
    """Any sizes, repeated up to hundreds of tensors; dtypes mixed; memory in any order and at any address."""
    sizes = data.draw(SIZES) + data.draw(st.integers(1, 40)) * data.draw(st.integers(0, 8)) * [3]
    dtypes = data.draw(st.lists(st.sampled_from([F32, F32, BF16, F64]), min_size=len(sizes), max_size=len(sizes)))
    kwargs = data.draw(OPTIONS[name]) | {"maximize": data.draw(st.booleans())}
    offset, turned = data.draw(st.integers(0, 3)), data.draw(st.booleans())
    limit = data.draw(st.sampled_from([None, 0.5, 1e6]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))

    def make(size: int, dtype: torch.dtype) -> Tensor:
        memory = torch.randn(offset + size, generator=generator).to(dtype)[offset:]
        return memory.view(size // 2, 2).t() if turned and size % 2 == 0 else memory

    values = [make(*each) for each in zip(sizes, dtypes, strict=True)]
    mine = [torch.nn.Parameter(v) for v in values]
    its = [torch.nn.Parameter(v.clone(memory_format=torch.preserve_format)) for v in values]
    ours, theirs = PAIRS[name]
    a, b = ours(mine, max_grad_norm=limit, **kwargs), theirs(its, **kwargs)
    for _ in range(2):
        for p, q in zip(mine, its, strict=True):
            p.grad = make(p.numel(), p.dtype).clone().view(p.shape) if not turned else torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        if limit is not None:
            torch.testing.assert_close(
                a.grad_norm, torch.nn.utils.clip_grad_norm_(its, limit).float(), rtol=1e-2, atol=0
            )
        b.step()
        for p, q in zip(mine, its, strict=True):
            if p.dtype in NARROW:
                assert_close(p, q)
            else:
                torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)
            with torch.no_grad():
                q.copy_(p)
