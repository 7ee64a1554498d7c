"""ops.adamw_: layouts and dtypes that go elsewhere, errors, autograd's versions, registration, torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adamw_lists import BF16, F64, GRAD, HYPER, LARGEST, MEAN, PARAM, SQUARE, STEP, clone, make, same_bits
from torchweld import backend, ops, use_backend


def test_permuted_memory_is_served_and_other_layouts_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make([(4, 6, 5, 3), (7, 9), (8, 3)])
    permuted = clone(plain)
    for each in permuted[:STEP]:
        each[0] = each[0].to(memory_format=torch.channels_last)
        each[1] = each[1].t().contiguous().t()
    monkeypatch.setattr(backend._settings, "loaded", True)
    monkeypatch.setattr(backend._settings, "strict", True)
    for lists in (plain, permuted):
        ops.adamw_(*lists, **HYPER, amsgrad=True)
    assert same_bits(plain, permuted)

    permuted[MEAN][0] = permuted[MEAN][0].contiguous()
    permuted[PARAM][2] = torch.stack([permuted[PARAM][2]] * 2, -1)[..., 0]
    before = clone(permuted)
    with pytest.raises(RuntimeError, match=r"\[adamw_\].*exp_avgs with other strides"):
        ops.adamw_(*permuted, **HYPER, amsgrad=True)
    assert same_bits(before, permuted)
    monkeypatch.setattr(backend._settings, "strict", False)
    for lists in (plain, permuted):
        ops.adamw_(*lists, **HYPER, amsgrad=True)
    for a, b in zip(plain, permuted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_other_dtypes_run_on_the_reference() -> None:
    mixed, exact = make([(50,), (30,)]), make([(50,), (30,)])
    for lists in (mixed, exact):
        for each in lists[:STEP]:
            each[1] = each[1].double()
    norm = ops.adamw_(*mixed, **HYPER, max_grad_norm=1.0)
    with use_backend("reference"):
        expected = ops.adamw_(*exact, **HYPER, max_grad_norm=1.0)
    torch.testing.assert_close(norm, expected)
    for a, b in zip(mixed, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert mixed[PARAM][1].dtype == F64 and [s.item() for s in mixed[STEP]] == [1.0, 4.0]


@pytest.mark.parametrize(
    ("index", "position", "value", "message"),
    [
        (GRAD, 1, torch.zeros(4), r"grads\[1\]: expected shape \[5\], but got \[4\]"),
        (SQUARE, 0, torch.zeros(3, 4), r"exp_avg_sqs\[0\]: expected shape \[4, 3\], but got \[3, 4\]"),
        (LARGEST, 1, torch.zeros(2), r"max_exp_avg_sqs\[1\]: expected shape \[5\]"),
        (
            GRAD,
            1,
            torch.zeros(5).int(),
            r"grads\[1\]: expected a floating-point dtype .*, but got int32",
        ),
        (
            GRAD,
            1,
            torch.zeros(5).to(torch.float8_e4m3fn),
            r"grads\[1\]: expected .* of 16 bits or more, but got float8",
        ),
        (GRAD, 1, torch.zeros(5) * 1j, r"grads\[1\]: expected a dtype that goes with float32, but got complex64"),
        (GRAD, 1, torch.zeros(5).to_sparse(), r"grads\[1\]: expected a dense tensor, but got a sparse_coo one"),
        (PARAM, 0, "x", r"params\[0\]: expected a torch.Tensor, but got str"),
        (STEP, 1, torch.zeros((), dtype=torch.bool), r"steps\[1\]: expected dtype float32, but got bool"),
        (MEAN, 0, torch.zeros(4, 3, device="meta"), r"exp_avgs\[0\]: expected a tensor on cpu, but got meta"),
        (STEP, 1, 3.0, r"steps\[1\]: expected a torch.Tensor, but got float"),
        (STEP, 1, torch.zeros(2), r"steps\[1\]: expected one element, but got shape \[2\]"),
    ],
)
def test_a_bad_tensor_is_named_and_nothing_changes(index: int, position: int, value: Any, message: str) -> None:
    lists = make([(4, 3), (5,)])
    before, good = clone(lists), lists[index][position]
    lists[index][position] = value
    with pytest.raises((ValueError, TypeError), match=r"^\[adamw_\] " + message):
        ops.adamw_(*lists, **HYPER, amsgrad=True)
    lists[index][position] = good
    assert same_bits(before, lists)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta1": 1.0}, r"beta1: expected 0 <= beta1 < 1, but got 1.0"),
        ({"beta2": -0.1}, r"beta2: expected 0 <= beta2 < 1, but got -0.1"),
        ({"eps": -1.0}, r"eps: expected eps >= 0, but got -1.0"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm: expected max_grad_norm > 0, or None, but got 0.0"),
        ({"found_inf": torch.zeros(2)}, r"found_inf: expected one element, but got shape \[2\]"),
    ],
)
def test_bad_options_are_named_and_nothing_changes(options: dict[str, Any], message: str) -> None:
    lists = make([(4, 3), (5,)])
    before = clone(lists)
    with pytest.raises(ValueError, match=r"^\[adamw_\] " + message):
        ops.adamw_(*lists, **{**HYPER, **options})
    assert same_bits(before, lists)


def test_lists_of_different_lengths() -> None:
    lists = make([(4,), (5,)])
    for index, name in ((GRAD, "grads"), (MEAN, "exp_avgs"), (LARGEST, "max_exp_avg_sqs"), (STEP, "steps")):
        short = [each[:1] if i == index else each for i, each in enumerate(lists)]
        with pytest.raises(ValueError, match=rf"^\[adamw_\] {name}: expected 2 tensors, as many as params, but got 1"):
            ops.adamw_(*short, **HYPER, amsgrad=True)
    with pytest.raises(ValueError, match="max_exp_avg_sqs: expected one tensor for each of params"):
        ops.adamw_(*lists[:LARGEST], [], lists[STEP], **HYPER, amsgrad=True)
    assert ops.adamw_([], [], [], [], [], [], **HYPER) is None


def test_versions_are_counted() -> None:
    lists = make([(5,), (6,)])
    before = [[t._version for t in each] for each in lists]
    ops.adamw_(*lists, **HYPER)
    moved = [all(t._version > v for t, v in zip(a, b, strict=True)) for a, b in zip(lists, before, strict=True)]
    assert moved == [True, False, True, True, False, True]
    with torch.inference_mode():
        ops.adamw_(*make([(5,)]), **HYPER)


def test_registration() -> None:
    lists, masters = make([(5,), (2, 3)], BF16, BF16), make([(5,), (2, 3)])[PARAM]
    one, zero = torch.tensor(2.0), torch.tensor(0.0)
    tail = (1e-2, None, 0.1, False, 1.0, one, one, zero, True)
    torch.library.opcheck(torch.ops.torchweld.adamw_.default, (*lists, masters, 0.9, 0.95, 1e-6, True, *tail, None))
    torch.library.opcheck(torch.ops.torchweld.adamw_.default, (*lists, [], 0.9, 0.95, 1e-6, True, *tail, 7))
    torch.library.opcheck(torch.ops.torchweld.sgd_.default, (*lists[:3], masters, 0.9, 0.1, False, True, *tail, None))
    torch.library.opcheck(torch.ops.torchweld.grad_norm.default, (lists[GRAD], None))


def test_compiles_into_one_graph() -> None:
    def step(*lists: list[Tensor]) -> Tensor | None:
        return ops.adamw_(*lists, **HYPER, max_grad_norm=1.0)

    eager, compiled = make([(5,), (2, 3)]), make([(5,), (2, 3)])
    a, b = step(*eager), torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    assert torch.equal(a, b) and same_bits(eager, compiled)
