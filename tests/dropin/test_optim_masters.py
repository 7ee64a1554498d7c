"""Masters and offloaded state follow whoever writes to a parameter, by whatever road; nothing else moves them."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed import checkpoint

from optim_parameters import BF16, F32, PAIRS
from torchweld import ops, optim, use_backend
from torchweld.optim import offload

F16 = torch.float16
BITS = {2: torch.int16, 4: torch.int32}


def every_pattern(dtype: torch.dtype) -> Tensor:
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)


def bits(t: Tensor) -> Tensor:
    """As integers; all NaNs are one."""
    return torch.where(t.isnan(), torch.full_like(t, torch.nan), t).view(BITS[t.element_size()])


def masters_of_all_kinds(dtype: torch.dtype, seed: int) -> Tensor:
    """A master near every pattern: within an ulp of it to both sides, at ties, exact; not below float32's normals."""
    wide = every_pattern(dtype).float()
    low = torch.randint(0, 65536, wide.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    low[::5], low[1::5] = 0, 0x8000 if dtype == BF16 else 0x1000
    shifted = (wide.view(torch.int32) + (low if dtype == BF16 else low >> 3)).view(F32)
    shifted = torch.where(shifted.abs() < 2.0**-126, wide.sign() * 0.0, shifted)
    return torch.where(wide.isfinite(), shifted, wide)


def keep(param: Tensor, master: Tensor, seed: int | None = None) -> None:
    """A step that moves nothing."""
    zero = [torch.zeros_like(master)]
    if seed is None:
        ops.sgd_([param], zero, [], lr=0.0, masters=[master])
    else:
        rest = {"lr": 0.0, "beta1": 0.9, "beta2": 0.99, "eps": 1.0, "weight_decay": 0.0, "rounding_seed": seed}
        ops.adamw_([param], zero, [zero[0].clone()], [zero[0].clone()], [], [torch.zeros(())], masters=[master], **rest)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_a_rounding_leaves_its_master_alone(isa: str, dtype: torch.dtype) -> None:
    master = masters_of_all_kinds(dtype, 0)
    param, before = master.to(dtype), master.clone()
    keep(param, master)
    assert torch.equal(bits(master), bits(before)) and torch.equal(bits(param), bits(before.to(dtype)))


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_any_other_value_is_taken(isa: str, dtype: torch.dtype) -> None:
    """Every pattern over masters of other values, among them infinities, NaN and zeros of either sign."""
    for turn in (1, 2, 4099, 32768):
        master = masters_of_all_kinds(dtype, turn).roll(turn)
        param = every_pattern(dtype).clone()
        other = bits(param) != bits(master.to(dtype))
        expected = torch.where(other, param.float(), master)
        normal = (expected == 0) | (expected.abs() >= 2.0**-126) | expected.isnan()  # conversions may flush the others
        keep(param, master)
        assert torch.equal(bits(master)[normal], bits(expected)[normal])
        assert (master - expected)[~normal].abs().max() < 2.0**-125 if not normal.all() else True


def test_both_neighbours_are_roundings_at_random(isa: str) -> None:
    master = masters_of_all_kinds(BF16, 3)
    down = (master.view(torch.int32) & -0x10000).view(F32).bfloat16()
    up = torch.where(master.bfloat16() == down, down, master.bfloat16())
    before = master.clone()
    for param in (down, up):
        keep(param.clone(), master, seed=5)
        finite = before.isfinite()
        assert torch.equal(bits(master)[finite], bits(before)[finite])
    ours, theirs = master.clone(), master.clone()
    one, two = every_pattern(BF16).roll(1).clone(), every_pattern(BF16).roll(1).clone()
    keep(one, ours, seed=5)
    with use_backend("reference"):
        keep(two, theirs, seed=5)
    assert torch.equal(bits(ours), bits(theirs)) and torch.equal(bits(one), bits(two))


def test_an_fp32_parameter_is_what_its_master_copies() -> None:
    param, master = torch.randn(37), torch.randn(37)
    expected = param.clone()
    keep(param, master)
    assert torch.equal(master, expected) and torch.equal(param, expected)


def through_a_checkpoint(p: Tensor, value: Tensor) -> None:
    with tempfile.TemporaryDirectory() as path:
        checkpoint.save({"p": value}, checkpoint_id=path, no_dist=True)
        checkpoint.load({"p": p.detach()}, checkpoint_id=path, no_dist=True)


def load_state_dict(p: Tensor, value: Tensor) -> None:
    module = torch.nn.Module()
    module.p = p
    file = io.BytesIO()
    torch.save({"p": value}, file)
    file.seek(0)
    module.load_state_dict(torch.load(file))


WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "copy_": lambda p, value: torch.no_grad()(p.copy_)(value),
    ".data.copy_": lambda p, value: p.data.copy_(value),
    ".data =": lambda p, value: setattr(p, "data", value.clone()),
    "set_": lambda p, value: torch.no_grad()(p.set_)(value.clone()),
    "vector_to_parameters": lambda p, value: torch.nn.utils.vector_to_parameters(value.flatten(), [p]),
    "DLPack": lambda p, value: torch.from_dlpack(p.detach()).copy_(value),
    "NumPy": lambda p, value: np.copyto(p.detach().view(torch.int16 if p.element_size() == 2 else p.dtype).numpy(),
                                        value.view(torch.int16 if p.element_size() == 2 else p.dtype).numpy()),
    "_foreach_copy_ of .data": lambda p, value: torch._foreach_copy_([p.data], [value]),
    "a distributed checkpoint": through_a_checkpoint,
    "load_state_dict": load_state_dict,
    "untyped storage": lambda p, value: p.untyped_storage().copy_(value.untyped_storage()),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("road", ["beside", "offloaded", "mirrored"])
@pytest.mark.parametrize("name", PAIRS)
def test_the_next_step_starts_from_what_was_written(monkeypatch: pytest.MonkeyPatch, name: str, road: str) -> None:
    monkeypatch.setattr(offload, "is_away", lambda _: road == "mirrored")
    home = {} if road == "beside" else {"offload": "cpu"}
    for dtype, options in ((BF16, {"master_weights": True}), (F16, {"master_weights": True}), (F32, {})):
        for how, write in WRITES.items():
            p = torch.nn.Parameter(torch.randn(5, 7).to(dtype))
            optimizer = PAIRS[name][0]([p], lr=0.1, weight_decay=0.0, **options, **home)
            p.grad = torch.ones_like(p)
            optimizer.step()
            value = torch.randn(5, 7).to(dtype)
            write(p, value)
            optimizer.param_groups[0]["lr"], p.grad = 1e-9, torch.zeros_like(p)
            optimizer.step()
            assert (p.detach() - value).abs().max() < 1e-6, (how, dtype)


def test_an_unwritten_master_keeps_its_low_bits() -> None:
    """A move of the same values into other memory writes nothing new."""
    p = torch.nn.Parameter(torch.ones(64, dtype=BF16))
    optimizer = optim.AdamW([p], lr=2**-12, weight_decay=0.0, master_weights=True)
    for _ in range(8):
        p.grad = torch.ones_like(p)
        optimizer.step()
        p.data = p.data.clone()
    assert abs(float(1 - optimizer.state[p]["master_param"].mean()) - 8 * 2**-12) < 1e-6
