"""Around a step of optim.AdamW: clipping, GradScaler, schedulers, hooks, closures, what torch serves instead."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from optim_parameters import PAIRS, parameters, run, set_grads, states
from torchweld import backend, optim, use_backend


@pytest.mark.parametrize("foreach", [None, True], ids=["kernels", "torch's step"])
@pytest.mark.parametrize("limit", [0.5, 1e3])
def test_max_grad_norm_is_clip_grad_norm_over_all_groups(foreach: bool | None, limit: float) -> None:
    mine, its = parameters(), parameters()
    a = optim.AdamW([{"params": mine[:3], "lr": 0.1}, {"params": mine[3:]}], max_grad_norm=limit, foreach=foreach)
    b = torch.optim.AdamW([{"params": its[:3], "lr": 0.1}, {"params": its[3:]}])
    assert a.grad_norm is None
    for seed in range(3):
        set_grads(mine, seed), set_grads(its, seed)
        a.step()
        norm = torch.nn.utils.clip_grad_norm_(its, limit)
        b.step()
        torch.testing.assert_close(a.grad_norm, norm)
    torch.testing.assert_close(mine, its)

    a.param_groups[1]["max_grad_norm"] = None  # not clipped; its gradients count in the norm all the same
    set_grads(mine, 9), set_grads(its, 9)
    a.step()
    torch.nn.utils.clip_grads_with_norm_(its[:3], limit, torch.nn.utils.get_total_norm([p.grad for p in its[:-1]]))
    b.step()
    torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}, {"max_grad_norm": 0.5}], ids=str)
def test_grad_scaler(options: dict[str, Any]) -> None:
    mine, its = parameters(), parameters()
    a, b = optim.AdamW(mine, **options), torch.optim.AdamW(its)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2)]
    for seed in range(4):
        before = [p.detach().clone() for p in mine]
        steps = [s["step"].item() for s in states(a, mine)]
        for params, optimizer, scaler in ((mine, a, scalers[0]), (its, b, scalers[1])):
            scaler.scale(torch.zeros(()))  # the scale exists from the first call on
            set_grads(params, seed, scaler.get_scale())
            if seed == 2:
                params[1].grad[3] = torch.inf
            if optimizer is b and options.get("max_grad_norm"):
                scaler.unscale_(b)
                torch.nn.utils.clip_grad_norm_(its, 0.5)
            scaler.step(optimizer)
            scaler.update()
        if seed == 2:
            assert all(torch.equal(p, q) for p, q in zip(mine, before, strict=True))
            assert [s["step"].item() for s in states(a, mine)] == steps
        elif "max_grad_norm" not in options:
            torch.testing.assert_close([p.grad for p in mine], [p.grad for p in its])
    assert scalers[0].state_dict() == scalers[1].state_dict()
    torch.testing.assert_close(mine, its)
    assert not hasattr(a, "grad_scale") and not hasattr(a, "found_inf")


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["number", "tensor"])
@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),  # cycles beta1 as well
    ],
    ids=["cosine", "lambda", "one cycle"],
)
def test_schedulers(schedule: Callable[[torch.optim.Optimizer], Any], lr: float | Tensor) -> None:
    results = []
    for cls in PAIRS["AdamW"]:
        params = parameters()
        optimizer = cls(params, lr=copy.deepcopy(lr))
        scheduler = schedule(optimizer)
        for seed in range(6):
            run(optimizer, params, range(seed, seed + 1))
            scheduler.step()
        results.append(params)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("options", [{}, {"foreach": True}], ids=["kernels", "torch's step"])
def test_hooks_run_once_and_versions_are_counted(options: dict[str, Any]) -> None:
    torch.optim.AdamW(parameters()), torch.optim.Adam(parameters())  # torch wraps their step in hooks of its own
    params, calls = parameters(), []
    optimizer = optim.AdamW(params, **options)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum((p * p).sum() for p in params[:-1])
        loss.backward()
        calls.append("closure")
        return loss

    versions = [p._version for p in params[:-1]]
    loss = optimizer.step(closure)
    assert calls == ["before", "closure", "after"] and loss.requires_grad
    assert all(p._version > v for p, v in zip(params[:-1], versions, strict=True))


def test_complex_parameters_are_pairs_of_real_ones() -> None:
    weights = [torch.nn.Parameter(torch.arange(4.0).to(torch.complex64)) for _ in range(2)]
    for w in weights:
        w.grad = torch.full_like(w, 1 + 2j)
    ours, theirs = optim.Adam([weights[0]], amsgrad=True), torch.optim.Adam([weights[1]], amsgrad=True)
    with backend.strict():
        ours.step()
    theirs.step()
    torch.testing.assert_close(*weights)
    torch.testing.assert_close(ours.state_dict()["state"], theirs.state_dict()["state"])


def test_what_the_kernels_do_not_take_is_served_by_torch(caplog: pytest.LogCaptureFixture) -> None:
    params, expected = parameters(), parameters()
    betas = (torch.tensor(0.9), torch.tensor(0.999))
    with caplog.at_level(logging.INFO, "torchweld"):
        run(optim.Adam(params, betas=betas, foreach=False), params, range(1))
    run(torch.optim.Adam(expected), expected, range(1))
    torch.testing.assert_close(params, expected)
    assert "betas given as tensors" in caplog.text
    params[0].grad = torch.zeros_like(params[0]).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optim.Adam(params).step()
    with pytest.raises(ValueError, match="Invalid max_grad_norm value: -1; expected a number above 0, or None"):
        optim.AdamW(parameters(), max_grad_norm=-1)


def test_the_reference_backend_is_another_road_to_the_same_place() -> None:
    a, b = parameters(), parameters()
    with use_backend("reference"):
        expected = run(optim.AdamW(a, max_grad_norm=0.5), a)
    torch.testing.assert_close(run(optim.AdamW(b, max_grad_norm=0.5), b), expected)


def test_a_compiled_step_runs_the_kernels() -> None:
    a, b = parameters(), parameters()
    optimizer = optim.AdamW(a, max_grad_norm=0.5)
    step = torch.compile(optimizer.step, backend="aot_eager")
    for seed in range(3):
        set_grads(a, seed)
        step()
    expected = run(optim.AdamW(b, max_grad_norm=0.5), b)
    assert all(torch.equal(p, q) for p, q in zip(a, expected, strict=True)) and optimizer.grad_norm is not None
