"""ops.adamw_ and ops.grad_norm: exactness against float64, memory, determinism, bad values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from adamw_lists import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    GRAD,
    HYPER,
    LARGEST,
    MEAN,
    PARAM,
    SHAPES,
    SQUARE,
    STEP,
    VARIANTS,
    clone,
    hold_to_float64,
    make,
    same_bits,
    worst,
)
from torchweld import ops, reference


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(x)[6:] for x in d))
def test_steps_are_as_near_to_float64_as_torch_is(isa: str, dtypes: tuple[torch.dtype, ...], variant: str) -> None:
    hold_to_float64(SHAPES, dtypes, variant, "cpu")


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_first_steps_agree_with_torchs_own_kernel(isa: str, dtype: torch.dtype, clip: float | None) -> None:
    """Against torch's fused kernel, which shares no line with ours or with the reference."""
    ours = make(SHAPES, dtype, dtype, dtype)
    exact, torchs = clone(ours, F64), clone(ours)
    ops.adamw_(*ours, **HYPER, max_grad_norm=clip)
    reference.adamw_(*exact, **HYPER, max_grad_norm=clip)
    if clip is not None:
        parameters = [torch.nn.Parameter(p) for p in torchs[PARAM]]
        for p, g in zip(parameters, torchs[GRAD], strict=True):
            p.grad = g
        torch.nn.utils.clip_grad_norm_(parameters, clip)
    torch._foreach_add_(torchs[STEP], 1)
    torch._fused_adamw_(
        torchs[PARAM],
        torchs[GRAD],
        torchs[MEAN],
        torchs[SQUARE],
        [],
        torchs[STEP],
        amsgrad=False,
        maximize=False,
        **HYPER,
    )
    for i in (PARAM, MEAN, SQUARE):
        tiny = torch.finfo(dtype).eps * max(t.abs().max().item() for t in exact[i] if t.numel())
        assert worst(ours[i], exact[i]) <= 2 * worst(torchs[i], exact[i]) + tiny


@pytest.mark.parametrize("offset", range(1, 8))
def test_unaligned_memory_gives_the_same_bits(isa: str, offset: int) -> None:
    for dtypes in ((F32, F32, F32), (BF16, BF16, F32)):
        aligned, shifted = make(SHAPES, *dtypes), make(SHAPES, *dtypes, offset=offset)
        for each in (aligned, shifted):
            ops.adamw_(*each, **HYPER, amsgrad=True, max_grad_norm=1.0)
        assert same_bits(aligned, shifted)


def test_a_list_gives_the_same_bits_as_its_tensors_one_by_one(isa: str) -> None:
    shapes = [(1 + i % 7,) for i in range(600)] + [(40_003,)]
    together, alone = make(shapes), make(shapes)
    ops.adamw_(*together, **HYPER, amsgrad=True)
    for i in range(len(shapes)):
        ops.adamw_(*([each[i]] for each in alone), **HYPER, amsgrad=True)
    assert same_bits(together, alone)


@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (F16, F16, F32)])
@pytest.mark.usefixtures("threads")
def test_same_bits_at_any_number_of_threads(isa: str, dtypes: tuple[torch.dtype, ...]) -> None:
    shapes, results = [*SHAPES, (100_007,), (2,), (60_001,)], []
    for count in (1, 2, 3, 2):
        torch.set_num_threads(count)
        lists = make(shapes, *dtypes)
        norm = ops.adamw_(*lists, **HYPER, max_grad_norm=1.0)
        assert norm is not None
        results.append([[norm.reshape(1)], *lists])
    assert all(same_bits(results[0], r) for r in results[1:])


def test_nothing_is_written_outside_the_tensors(isa: str) -> None:
    guard = 40
    for dtype in (F32, BF16):
        lists = make(SHAPES, dtype, dtype, dtype)
        memory: list[torch.Tensor] = []
        inside: list[Any] = []
        for each in lists[:STEP]:
            blocks = [torch.full((t.numel() + 2 * guard,), torch.nan, dtype=dtype) for t in each]
            views = [b[guard : guard + t.numel()].view(t.shape).copy_(t) for b, t in zip(blocks, each, strict=True)]
            memory += blocks
            inside.append(views)
        inside.append(lists[STEP])
        ops.adamw_(*inside, **HYPER, amsgrad=True, grad_scale=torch.tensor(2.0))
        for block in memory:
            assert block[:guard].isnan().all() and block[-guard:].isnan().all()
            assert not block[guard:-guard].isnan().any()


@pytest.mark.parametrize("beta1", [0.0, 0.3, 0.9])
def test_the_mean_goes_from_its_nearer_end(isa: str, beta1: float) -> None:
    """As torch's lerp does: it is the gradient where beta1 is 0, and else rounds once, but for the smaller term."""
    for scale in (1.0, 1e5):
        lists = make([(1009,)], F32)
        mean, grad = lists[MEAN][0].mul_(scale).double(), lists[GRAD][0].double()
        smaller = min(beta1, 1 - beta1) * (grad - mean).abs()
        exact = mean.lerp(grad, 1 - beta1)
        ops.adamw_(*lists, **{**HYPER, "beta1": beta1})
        half_ulp = torch.finfo(F32).eps / 2
        assert ((lists[MEAN][0] - exact).abs() <= half_ulp * (exact.abs() + 3 * smaller)).all()


def test_a_bad_gradient_stays_in_its_own_element(isa: str) -> None:
    clean, bad = make([(100,), (40,)]), make([(100,), (40,)])
    bad[GRAD][0][7], bad[GRAD][0][20], bad[GRAD][1][3] = math.nan, math.inf, -math.inf
    for each in (clean, bad):
        ops.adamw_(*each, **HYPER, amsgrad=True)
    for i in (PARAM, MEAN, SQUARE, LARGEST):
        differ = [(a != b).nonzero().flatten().tolist() for a, b in zip(clean[i], bad[i], strict=True)]
        assert differ == [[7, 20], [3]]
        assert bad[i][0][7].isnan()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_clipping_a_bad_norm_does_what_clip_grad_norm_does(value: float) -> None:
    ours = make([(9,), (4,)])
    ours[GRAD][0][2] = value
    torchs = clone(ours)
    norm = ops.adamw_(*ours, **HYPER, max_grad_norm=1.0)
    parameter = torch.nn.ParameterList(torchs[PARAM])
    for p, g in zip(parameter, torchs[GRAD], strict=True):
        p.grad = g
    expected = torch.nn.utils.clip_grad_norm_(parameter, 1.0)
    ops.adamw_(*torchs, **HYPER)
    torch.testing.assert_close(norm, expected, equal_nan=True)
    torch.testing.assert_close(ours[PARAM], torchs[PARAM], equal_nan=True)


def test_overflow_moves_nothing_and_scaling_is_undone(isa: str) -> None:
    start = make(SHAPES)
    lists = clone(start)
    ops.adamw_(*lists, **HYPER, amsgrad=True, grad_scale=torch.tensor(4.0), found_inf=torch.tensor(1.0))
    assert same_bits(lists, start)

    scaled = clone(start)
    scaled[GRAD] = [g * 1024 for g in scaled[GRAD]]
    options = {**HYPER, "max_grad_norm": 1.0, "lr": torch.tensor(1e-2, dtype=F64)}
    a = ops.adamw_(*lists, **options)
    b = ops.adamw_(*scaled, **options, grad_scale=torch.tensor([1024.0]), found_inf=torch.tensor([0.0]))
    assert a is not None and b is not None and torch.equal(a, b) and same_bits(lists, scaled)


def test_grad_norm(isa: str) -> None:
    for dtype in (F32, BF16, F16):
        for shapes in (SHAPES, [(0,)], [(3,)] * 2000, [(70_001,)]):
            grads = make(shapes, grad=dtype)[GRAD]
            exact = reference.grad_norm([g.double() for g in grads])
            norm = ops.grad_norm(grads, grad_scale=torch.tensor(-2.0))
            assert norm.dtype == F32 and abs(2 * norm.item() - exact.item()) <= 1e-6 * exact.item()
    with pytest.raises(ValueError, match=r"\[grad_norm\] grads: expected at least one tensor"):
        ops.grad_norm([])
