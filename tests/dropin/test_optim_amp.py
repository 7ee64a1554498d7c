"""GradScaler and its wrappers: as stock AdamW, unless fused=True asks the step to unscale and to skip."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch

from optim_parameters import PAIRS
from torchweld import optim

PROMISE = "_step_supports_amp_scaling"


@pytest.mark.parametrize("fused", [None, False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_the_promise_to_wrappers_is_torchs(name: str, fused: bool | None) -> None:
    ours, theirs = ([cls([torch.nn.Parameter(torch.ones(2))], fused=fused)] for cls in PAIRS[name])
    for each in (ours, theirs):
        each.append(type(each[0])([torch.nn.Parameter(torch.ones(2))]))
        each[1].load_state_dict(each[0].state_dict())
    assert [getattr(o, PROMISE, False) for o in ours] == [getattr(o, PROMISE, False) for o in theirs]


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_a_course_with_overflows_is_torchs(name: str, options: dict[str, Any]) -> None:
    """Two optimizers, one unscaled by hand and clipped; infinities in either, NaN behind unscale_."""
    courses = []
    for cls in PAIRS[name]:
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s)) for s in ((5, 7), (64,), ())]
        optimizers = [cls(params[:2], lr=0.1, **options), cls(params[2:], lr=0.1, **options)]
        scaler, said = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2), []
        for turn in range(10):
            torch.manual_seed(turn)
            scaler.scale(sum((p * torch.randn(p.shape)).sum() for p in params)).backward()
            if turn in (2, 7):
                params[turn % 3].grad.view(-1)[0] = math.inf if turn == 2 else math.nan
            if turn in (3, 4, 7):
                scaler.unscale_(optimizers[0])
                torch.nn.utils.clip_grad_norm_(params[:2], 1.0)
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            said.append(scaler.get_scale())
            for optimizer in optimizers:
                optimizer.zero_grad()
        courses.append((said, [p.detach() for p in params]))
    assert courses[0][0] == courses[1][0]
    torch.testing.assert_close(courses[0][1], courses[1][1])


def test_zeroed_gradients_are_zeroed_after_an_overflow_too() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    for optimizer in (made := optim.AdamW([p], zero_grads=True), pickled(made)):
        target = optimizer.param_groups[0]["params"][0]
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(target.sum()).backward()
        target.grad[0] = math.inf
        before = target.detach().clone()
        scaler.step(optimizer)
        assert torch.equal(target, before) and not target.grad.any()


def pickled(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return pickle.loads(pickle.dumps(optimizer))


@pytest.mark.filterwarnings("ignore:Seems like `optimizer.step")
def test_accelerate_sees_a_skipped_step() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True)
    for overflow in (True, False):
        p = torch.nn.Parameter(torch.ones(3))
        inner, scaler = optim.AdamW([p], lr=0.1), torch.amp.GradScaler("cpu", init_scale=4.0)
        optimizer = accelerate.optimizer.AcceleratedOptimizer(inner, device_placement=False, scaler=scaler)
        step_lr = torch.optim.lr_scheduler.StepLR(inner, 1, 0.5)
        scheduler = accelerate.scheduler.AcceleratedScheduler(step_lr, [optimizer], split_batches=True)
        scaler.scale(p.sum()).backward()
        p.grad[0] = math.inf if overflow else 1.0
        optimizer.step()
        scheduler.step()
        assert optimizer.step_was_skipped == overflow
        assert inner.param_groups[0]["lr"] == (0.1 if overflow else 0.05)


def test_lightning_clips_in_mixed_precision() -> None:
    precision = pytest.importorskip("lightning.pytorch.plugins.precision")
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    plugin = precision.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    plugin.clip_gradients(optim.AdamW([p]), 1.0)
    torch.testing.assert_close(p.grad.norm(), torch.tensor(1.0))
