"""The rule of exactness catches what it is there to catch, and lets two correct roundings pass."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from torchweld import testing
from torchweld.testing import Oracle, assert_parity, cases, parity
from torchweld.testing.attention import AttentionCase
from torchweld.testing.inputs import LAYOUTS, Random, place

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sample(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A float64 tensor, and it rounded to `dtype`."""
    exact = torch.randn(40, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return exact, exact.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_correct_rounding_passes(dtype: torch.dtype) -> None:
    exact, rounded = sample(dtype)
    verdict = parity("y", rounded, rounded, exact)
    assert verdict.problem is None
    assert 0 < verdict.ratio <= 0.5
    up = torch.nextafter(rounded.float(), torch.tensor(math.inf)).to(dtype)  # the other of two neighbours, for some
    assert parity("y", up, rounded, exact).problem is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_wrong_element_is_found_and_named(dtype: torch.dtype) -> None:
    exact, rounded = sample(dtype)
    ours = rounded.clone()
    ours[17, 3] += 8 * torch.finfo(dtype).eps * rounded.abs().max()
    verdict = parity("y", ours, rounded, exact)
    assert verdict.problem is not None and verdict.ratio > 1
    with pytest.raises(AssertionError, match=r"^\[op\] case 'name', dx: max.ours - fp64. = .* at \[17, 3\] .* allowed"):
        assert_parity({"dx": ours}, {"dx": rounded}, {"dx": exact}, op="op", case="name")


def test_what_is_allowed_is_twice_torchs_error_and_an_ulp_of_the_scale() -> None:
    exact = torch.tensor([3.0, 1.0], dtype=torch.float64)
    theirs = torch.tensor([3.0, 1.5])
    verdict = parity("y", torch.tensor([3.0, 2.0]), theirs, exact)
    assert (verdict.error, verdict.torch_error) == (1.0, 0.5)
    assert verdict.allowed == 1.0 + 2 * torch.finfo(torch.float32).eps  # 3 lies in [2, 4)
    assert verdict.problem is None
    assert parity("y", torch.tensor([3.0, 2.0001]), theirs, exact).problem is not None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_must_stand_where_it_belongs(value: float) -> None:
    exact, rounded = sample(torch.float32)
    spoiled, spoiled_exact = rounded.clone(), exact.clone()
    spoiled[2, 5] = spoiled_exact[2, 5] = value
    assert parity("y", spoiled, spoiled, spoiled_exact).problem is None
    verdict = parity("y", spoiled, rounded, exact)
    assert verdict.ratio == math.inf
    assert verdict.problem is not None and verdict.problem.startswith("1 values wrong in kind, the first at [2, 5]")
    assert parity("y", rounded, spoiled, spoiled_exact).problem is not None
    # Torch's own NaN excuses nothing.
    assert parity("y", spoiled, spoiled, exact).problem is not None


def test_infinities_have_a_sign_and_overflow_counts_in_the_outputs_dtype() -> None:
    exact = torch.tensor([1.0, math.inf], dtype=torch.float64)
    assert parity("y", torch.tensor([1.0, -math.inf]), torch.tensor([1.0, math.inf]), exact).problem is not None
    beyond = torch.tensor([1.0, 1e6], dtype=torch.float64)
    half = beyond.half()
    assert half[1] == math.inf and parity("y", half, half, beyond).problem is None


def test_shape_dtype_and_names_must_be_torchs() -> None:
    exact, rounded = sample(torch.bfloat16)
    assert "expected dtype" in str(parity("y", rounded.float(), rounded, exact).problem)
    assert "expected shape" in str(parity("y", rounded[:, :1], rounded, exact).problem)
    with pytest.raises(AssertionError, match=r"expected the tensors \['y', 'dx'\], but got \['y'\]"):
        assert_parity({"y": rounded}, {}, {"y": exact, "dx": exact}, op="op", case="c")


def test_where_everything_cancels_the_terms_give_the_scale() -> None:
    zero = torch.zeros(8, dtype=torch.float64)
    ours = torch.full((8,), 1e-5)
    assert parity("dx", torch.zeros(8), torch.zeros(8), zero).problem is None
    assert parity("dx", ours, torch.zeros(8), zero).problem is not None
    assert parity("dx", ours, torch.zeros(8), zero, terms=300.0).problem is None  # eps of 300 is 3.6e-5
    assert parity("dx", 4 * ours, torch.zeros(8), zero, terms=300.0).problem is not None
    # The arithmetic of bfloat16 is float32: the terms give no more room there.
    assert parity("dx", 4 * ours.bfloat16(), torch.zeros(8).bfloat16(), zero, terms=300.0).problem is not None


def test_elements_that_are_zero_by_definition_are_judged_by_themselves() -> None:
    exact = torch.tensor([0.0, 0.0, 5.0], dtype=torch.float64)
    zeros, terms = torch.tensor([True, True, False]), torch.tensor([100.0, 0.0, 100.0])

    def problem(ours: list[float], theirs: list[float], terms: torch.Tensor = terms) -> str | None:
        return parity("dx", torch.tensor(ours), torch.tensor(theirs), exact, terms, zeros).problem

    # The error of the third element, torch's or ours, says nothing of the first two.
    assert problem([0.0, 0.0, 5.1], [0.0, 0.0, 5.1]) is None
    assert "at [0]" in str(problem([1e-3, 0.0, 5.0], [0.0, 0.0, 5.1]))
    # Where something cancels: twice torch's error there, and eps of the terms there.
    assert problem([1e-5, 0.0, 5.0], [0.0, 0.0, 5.0]) is None  # eps of 100 is 1.2e-5
    assert problem([2e-5, 0.0, 5.0], [0.0, 0.0, 5.0]) is not None
    assert problem([2e-5, 0.0, 5.0], [1e-5, 0.0, 5.0]) is None
    # Where nothing is summed at all only 0 is right, whatever torch has. Without terms that is everywhere.
    assert "at [1]" in str(problem([0.0, 1e-30, 5.0], [0.0, 1e-3, 5.0]))
    assert problem([0.0, -0.0, 5.0], [0.0, 1e-3, 5.0]) is None
    assert parity("dx", torch.tensor([1e-30, 0.0, 5.0]), torch.zeros(3), exact, zeros=zeros).problem is not None


def test_what_float64_leaves_of_an_exact_zero_is_no_error() -> None:
    exact, zeros = torch.tensor([1e-17, 1.0], dtype=torch.float64), torch.tensor([True, False])
    assert parity("dx", torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]), exact, zeros=zeros).problem is None


@pytest.mark.parametrize("logits", [1.0, 1e4])
def test_the_terms_of_attention_give_no_room_to_a_key_that_has_all_the_weight(logits: float) -> None:
    case = AttentionCase(name="causal", regime="", queries=9, keys=9, dim=8, causal=True, logits=logits)
    x = {n: t.double() for n, t in case.inputs(torch.float32).items()}
    terms, zeros = case.terms(x), case.zeros(x)
    output = terms["output"]
    assert isinstance(output, torch.Tensor)
    # One key is visible: its score, of any size, has no part in the output.
    torch.testing.assert_close(output[:, :, 0], x["value"][:, :, 0].abs())
    assert zeros["dquery"][:, :, 0].all() and not zeros["dquery"][:, :, 1:].any()
    assert not case.zeros(x | {"dlse": x["doutput"][..., 0]})["dkey"].any()


@pytest.mark.parametrize(("distance", "decided"), [(1e-7, False), (1e-4, True)])
def test_the_terms_of_attention_leave_open_which_key_wins_by_less_than_an_error(distance: float, decided: bool) -> None:
    case = AttentionCase(name="close", regime="", batch=1, heads=1, queries=1, keys=3, dim=4)
    x = {n: torch.ones(1, 1, 3 if n in ("key", "value") else 1, 4).double() for n in case.inputs(torch.float32)}
    x["query"] *= 1e9
    x["key"] *= torch.tensor([1.0, 1.0 - distance, 0.5]).double().unsqueeze(1)
    output = case.terms(x)["output"]
    assert isinstance(output, torch.Tensor)
    room = output * torch.finfo(torch.float32).eps
    assert (room < 1e-6).all() if decided else ((room > 2) & (room < 2.1)).all()


def test_of_attention_what_no_query_sees_is_zero() -> None:
    case = AttentionCase(name="mask", regime="", queries=6, keys=5, dim=4, bias=(1, 1, 6, 5), hide="right", lse=True)
    x = case.inputs(torch.float32, seed=3)
    hidden = x["bias"].isneginf()[0, 0].all(0)
    assert 0 < int(hidden.sum()) < 5
    zeros = case.zeros(x)
    for name in ("dkey", "dvalue"):
        assert torch.equal(zeros[name][0, 0, :, 0], hidden)
    assert torch.equal(zeros["dbias"][0, 0], x["bias"].isneginf()[0, 0])
    assert not zeros["output"].any()


def test_a_miss_of_a_few_elements_is_judged_over_more_draws() -> None:
    case = next(c for c in cases("cross_entropy") if c.name == "33 x 100 sum")
    oracle = Oracle(case, torch.float32)
    few = len(oracle.inputs)
    assert all(v.problem is None for v in oracle.judge(case.reference)) and len(oracle.inputs) == few
    oracle.torch["output"] = oracle.exact["output"].float()  # by luck torch has no error in these draws

    def wrong(x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"output": case.torch(x)["output"] * (1 + 1e-4)}

    assert any(v.problem for v in oracle.judge(wrong)) and len(oracle.inputs) == 32
    assert any(v.problem for v in oracle.judge(wrong)) and len(oracle.inputs) == 32
    oracle.check(case.reference)


def test_an_element_that_nobody_writes_is_found() -> None:
    case = cases("layer_norm")[0]
    oracle = Oracle(case, torch.float32)

    def forgetful(x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        output = case.ours(x)["output"]
        fresh = torch.empty_like(output)
        fresh[:-1] = output[:-1]
        return {"output": fresh}

    wrong = {v.tensor for v in oracle.judge(forgetful) if v.problem}
    assert "output" in wrong
    assert not torch.are_deterministic_algorithms_enabled()  # the poison is gone again
    oracle.check()


def test_without_poison_algorithms_are_those_that_were_asked_for() -> None:
    case, seen = cases("gelu")[0], []

    def provider(x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return case.ours(x)

    oracle = Oracle(case, torch.float32)
    for poison in (True, False):
        seen.clear()
        assert all(v.problem is None for v in oracle.judge(provider, poison=poison))
        assert set(seen) == {poison}


@pytest.mark.parametrize("op", testing.ops())
def test_torch_itself_and_the_reference_hold_the_rule(op: str) -> None:
    case = cases(op)[0]
    for dtype in case.dtypes:
        oracle = Oracle(case, dtype)
        assert all(v.ratio <= 0.5 for v in oracle.judge(case.torch))
        oracle.check(case.reference)


@pytest.mark.parametrize("op", testing.ops())
def test_a_wrong_gradient_or_state_is_found(op: str) -> None:
    case = cases(op)[0]
    oracle = Oracle(case, torch.float32)

    def wrong(x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        outputs = case.ours(x)
        if not case.leaves:
            return {n: t * 1.001 for n, t in outputs.items()}
        return {n: t.detach() + 1.001 * (t - t.detach()) for n, t in outputs.items()}

    missed = {v.tensor for v in oracle.judge(wrong) if v.problem}
    expected = {f"d{n}" for n in case.leaves if n in oracle.inputs[0]} if case.leaves else set(oracle.exact)
    assert missed == expected


@pytest.mark.parametrize("op", testing.ops())
def test_cases_have_names_of_their_own_and_repeatable_inputs(op: str) -> None:
    names = [c.name for c in cases(op)]
    assert len(set(names)) == len(names)
    for case in cases(op):
        assert case.op == op and case.regime
        for a, b in zip(case.inputs(torch.float32).values(), case.inputs(torch.float32).values(), strict=True):
            assert a.stride() == b.stride() and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_lie_among_nans(layout: str) -> None:
    values = Random(3, "cpu").normal(6, 10)
    placed = place(values, layout)
    assert torch.equal(placed, values)
    memory = torch.empty(0).set_(placed.untyped_storage())
    assert int(memory.isnan().sum()) >= values.numel() // 2 and int((~memory.isnan()).sum()) == values.numel()
    assert placed.is_contiguous() == (layout in ("contiguous", "unaligned"))
    assert (placed.data_ptr() % 64 != 0) or layout != "unaligned"


def test_nothing_is_said_on_the_way(recwarn: pytest.WarningsRecorder) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Oracle(cases("layer_norm")[0], torch.float32).check()
