"""What a step stores besides the plain parameter: masters, stochastic roundings, gradients as zeros."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from adamw_lists import BF16, F16, F32, F64, GRAD, HYPER, PARAM, SHAPES, STEP, clone, make, same_bits
from torchweld import ops, reference, use_backend

SEED = 2**40 + 5
LONG = [*SHAPES, (60_007,), (2,), (9_001,)]


def only_decay(shapes: list[tuple[int, ...]]) -> list[list[Tensor]]:
    """Lists whose step multiplies the parameters by a number and nothing else: the fp32 value has no two ways."""
    lists = make(shapes, BF16, BF16, F32)
    for each in lists[GRAD:STEP]:
        for t in each:
            t.zero_()
    return lists


def test_stochastic_rounding_has_the_references_bits(isa: str) -> None:
    ours, exact = only_decay(LONG), only_decay(LONG)
    for each in (ours, exact):  # in another order of memory
        each[PARAM][5], each[GRAD][5], each[2][5], each[3][5] = (each[i][5].t() for i in (PARAM, GRAD, 2, 3))
    for _ in range(3):
        ops.adamw_(*ours, **HYPER, rounding_seed=SEED)
        with use_backend("reference"):
            ops.adamw_(*exact, **HYPER, rounding_seed=SEED)
    assert same_bits(ours, exact)
    nearest = only_decay(LONG)
    ops.adamw_(*nearest, **HYPER)
    assert not same_bits(ours, nearest)


@pytest.mark.usefixtures("threads")
def test_stochastic_rounding_has_the_same_bits_at_any_number_of_threads(isa: str) -> None:
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        lists = make(LONG, BF16, BF16, F32)
        ops.adamw_(*lists, **HYPER, rounding_seed=SEED)
        results.append(lists)
    assert all(same_bits(results[0], r) for r in results[1:])


def test_stochastic_rounding_is_right_on_average(isa: str) -> None:
    """Every result is one of the two neighbours of the exact value, and their mean is that value."""
    n = 100_000
    lists = make([(n,)], BF16, BF16, F32)
    lists[PARAM][0].fill_(1.0)
    exact = clone(lists, F64)
    ops.adamw_(*lists, **HYPER, rounding_seed=SEED)
    reference.adamw_(*exact, **HYPER)
    found, value = lists[PARAM][0].double(), exact[PARAM][0]
    ulp = 2.0 ** (torch.frexp(value)[1].double() - 8)
    error = (found - value) / ulp
    assert error.abs().max() <= 1 + 1e-4
    share = value / ulp - (value / ulp).floor()
    deviation = float((share * (1 - share)).sum().sqrt()) / n
    assert deviation > 1e-4 and abs(float(error.mean())) < 5 * deviation
    different = make([(n,)], BF16, BF16, F32)
    different[PARAM][0].fill_(1.0)
    ops.adamw_(*different, **HYPER, rounding_seed=SEED + 1)
    assert (different[PARAM][0] != lists[PARAM][0]).double().mean() > 0.1


def test_stochastic_rounding_of_what_is_not_finite(isa: str) -> None:
    values = [math.inf, -math.inf, math.nan, 0.0, -0.0, 1.0]
    lists = only_decay([(6,)] * 40)
    for p in lists[PARAM]:
        p.copy_(torch.tensor(values))
    ops.adamw_(*lists, **{**HYPER, "weight_decay": 0.0}, rounding_seed=SEED)
    for p in lists[PARAM]:
        assert torch.equal(p[[0, 1, 3, 4, 5]].float(), torch.tensor(values)[[0, 1, 3, 4, 5]]) and p[2].isnan()
        assert p[4].signbit() and not p[3].signbit()
    with pytest.raises(
        ValueError, match=r"\[adamw_\] rounding_seed: expected None for params of float16, but got a seed"
    ):
        ops.adamw_(*make([(5,)], F16, F16, F32), **HYPER, rounding_seed=1)
    wide, plain = make([(50,)]), make([(50,)])
    ops.adamw_(*wide, **HYPER, rounding_seed=1)
    ops.adamw_(*plain, **HYPER)
    assert same_bits(wide, plain)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.usefixtures("threads")
def test_masters_step_as_fp32_does_and_parameters_are_their_rounding(isa: str, dtype: torch.dtype) -> None:
    for count in (1, 2):
        torch.set_num_threads(count)
        narrow, wide = make(LONG, dtype, F32, F32), make(LONG)
        masters = [p.clone() for p in wide[PARAM]]
        narrow[PARAM] = [m.to(dtype) for m in masters]
        for _ in range(3):
            ops.adamw_(*narrow, **HYPER, amsgrad=True, max_grad_norm=1.0, masters=masters)
            ops.adamw_(*wide, **HYPER, amsgrad=True, max_grad_norm=1.0)
        assert same_bits([masters], [wide[PARAM]])
        assert same_bits([narrow[PARAM]], [[m.to(dtype) for m in masters]])


def test_masters_that_do_not_fit() -> None:
    lists = make([(4, 3), (5,)], BF16, BF16, F32)
    before = clone(lists)
    wide = make([(4, 3), (5,)])[PARAM]
    for masters, message in (
        (wide[:1], r"masters: expected 2 tensors, as many as params, but got 1"),
        ([wide[0], torch.zeros(4)], r"masters\[1\]: expected shape \[5\], but got \[4\]"),
    ):
        with pytest.raises(ValueError, match=rf"^\[adamw_\] {message}"):
            ops.adamw_(*lists, **HYPER, masters=masters)
    assert same_bits(lists, before)


@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, F32, F32), (BF16, BF16, BF16)], ids=str)
def test_gradients_are_zeroed_in_the_same_pass(isa: str, dtypes: tuple[torch.dtype, ...]) -> None:
    for options in (HYPER, HYPER | {"grad_scale": torch.tensor(4.0)}, HYPER | {"max_grad_norm": 0.5}):
        zeroed, plain = make(LONG, *dtypes), make(LONG, *dtypes)
        versions = [g._version for g in zeroed[GRAD]]
        ops.adamw_(*zeroed, **options, zero_grads=True)
        ops.adamw_(*plain, **options)
        assert not any(g.any() for g in zeroed[GRAD])
        assert all(g._version > v for g, v in zip(zeroed[GRAD], versions, strict=True))
        zeroed[GRAD] = plain[GRAD]
        assert same_bits(zeroed, plain)
    lists, before = make(LONG, *dtypes), make(LONG, *dtypes)
    lists[GRAD][3][0] = math.inf
    ops.adamw_(*lists, **HYPER, found_inf=torch.tensor(1.0), zero_grads=True)
    assert not any(g.any() for g in lists[GRAD])
    lists[GRAD] = before[GRAD]
    assert same_bits(lists, before)


@pytest.mark.usefixtures("threads")
def test_sgd_on_lists(isa: str) -> None:
    """Bits over threads and unaligned memory; dampening at the first step; overflow; zeroed gradients."""
    results = []
    for count, offset in ((1, 0), (2, 0), (3, 5)):
        torch.set_num_threads(count)
        lists = make(LONG, offset=offset)[:3]
        options: dict[str, Any] = {
            "lr": 0.1,
            "momentum": 0.9,
            "dampening": 0.5,
            "weight_decay": 0.1,
            "max_grad_norm": 1.0,
        }
        norm = ops.sgd_(*lists, **options, first_step=True)
        ops.sgd_(*lists, **options, zero_grads=True)
        assert not any(g.any() for g in lists[GRAD])
        assert norm is not None
        results.append([*lists, [norm.reshape(1)]])
    assert all(same_bits(results[0], r) for r in results[1:])
    exact = clone(make(LONG)[:3], F64)
    for first in (True, False):
        reference.sgd_(*exact, **options, first_step=first)
    for i in (PARAM, 2):
        torch.testing.assert_close(results[0][i], [t.float() for t in exact[i]])
    before = clone(results[0])
    ops.sgd_(*results[0][:3], lr=0.1, momentum=0.9, found_inf=torch.tensor(1.0))
    assert same_bits(results[0], before)


def test_bad_arguments_of_sgd_are_named() -> None:
    lists = make([(4, 3), (5,)])[:3]
    before = clone(lists)
    for change, message in (
        ({"momentum": -1.0}, r"momentum: expected momentum >= 0, but got -1.0"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm: expected max_grad_norm > 0, or None, but got 0.0"),
        ({"momentum": 0.9, "buffers": []}, "momentum_buffers: expected one tensor for each of params"),
        (
            {"momentum": 0.9, "buffers": lists[2][:1]},
            "momentum_buffers: expected 2 tensors, as many as params, but got 1",
        ),
        ({"masters": [torch.zeros(4, 3)] * 2}, r"masters\[1\]: expected shape \[5\], but got \[4, 3\]"),
    ):
        options: dict[str, Any] = {**change}
        buffers = options.pop("buffers", lists[2])
        with pytest.raises(ValueError, match=rf"^\[sgd_\] {message}"):
            ops.sgd_(lists[PARAM], lists[GRAD], buffers, lr=0.1, **options)
    assert same_bits(lists, before)
    assert ops.sgd_([], [], [], lr=0.1) is None
