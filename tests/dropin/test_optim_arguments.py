"""What is odd in the arguments of a step: iterators, grad mode, scalars of a wrong kind, memory that is shared."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from adamw_lists import HYPER, clone, make, same_bits
from optim_parameters import PAIRS
from torchweld import ops, use_backend


def test_iterators_are_read_once_and_what_they_make_is_kept() -> None:
    lists = make([(5,), (3, 401), (0,)])
    expected = clone(lists)
    ops.adamw_(*expected, **HYPER, amsgrad=True)
    grads = [g.tolist() for g in lists[1]]

    def fresh() -> Any:
        for g, like in zip(grads, lists[0], strict=True):
            gc.collect()
            yield torch.tensor(g).reshape(like.shape)

    others = [iter(each) for each in lists[2:]]
    ops.adamw_(dict(enumerate(lists[0])).values(), fresh(), *others, **HYPER, amsgrad=True)
    assert same_bits(lists, expected)
    norm = ops.grad_norm(g for g in lists[1])
    assert torch.equal(norm, ops.grad_norm(lists[1]))
    p, q = [torch.ones(3)], [torch.ones(3)]
    ops.sgd_(iter(p), iter(q), iter([torch.zeros(3)]), lr=0.5, momentum=0.9, masters=iter([]))
    assert torch.equal(p[0], torch.full((3,), 0.5))


@pytest.mark.parametrize("value", [torch.ones(3), None, 3.0])
def test_what_is_no_list_is_refused(value: Any) -> None:
    lists = make([(3,)])
    with pytest.raises(
        TypeError, match=r"\[adamw_\] grads: expected a list of tensors, but got (Tensor|NoneType|float)"
    ):
        ops.adamw_(lists[0], value, *lists[2:], **HYPER)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["found_inf", "grad_scale", "grad_norm", "lr"])
def test_scalars_of_a_wrong_kind_are_named(name: str, backend: str) -> None:
    lists = make([(3,)])
    before = clone(lists)
    with use_backend(backend):
        with pytest.raises(ValueError, match=rf"\[adamw_\] {name}: expected one element, but got shape \[2\]"):
            ops.adamw_(*lists, **{**HYPER, name: torch.zeros(2)})
        if name != "lr":
            with pytest.raises(
                TypeError, match=rf"\[adamw_\] {name}: expected a torch.Tensor of one element, .* float"
            ):
                ops.adamw_(*lists, **{**HYPER, name: 1.0})
    assert same_bits(lists, before)
    for good in (torch.tensor(True), torch.tensor([1]), torch.ones((), dtype=torch.float64)):
        ops.adamw_(*lists, **HYPER, found_inf=good)
    assert same_bits(lists, before)


def test_grad_mode_is_met_as_torch_meets_it() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(
        RuntimeError, match=r"params\[0\]: a leaf Variable that requires grad is being used in an in-place"
    ):
        ops.sgd_([p], [torch.ones(3)], [], lr=0.1)
    with pytest.raises(RuntimeError, match=r"grads\[0\]: a tensor that requires grad"):
        ops.sgd_([torch.ones(3)], [p * 2], [], lr=0.1)
    assert torch.equal(p, torch.ones(3)) and p._version == 0
    with torch.no_grad():
        ops.sgd_([p], [torch.ones(3)], [], lr=0.1)
    assert p._version == 1


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("how", ["twice", "tied", "overlapping"])
@pytest.mark.parametrize("name", PAIRS)
def test_parameters_that_share_memory_are_stepped_in_turn(name: str, how: str) -> None:
    n = 400_000 if how == "overlapping" else 70
    results = []
    for cls in PAIRS[name]:
        torch.manual_seed(0)
        memory = torch.randn(n + n // 2)
        p = torch.nn.Parameter(memory[:n])
        q = {"twice": p, "tied": torch.nn.Parameter(p.data), "overlapping": torch.nn.Parameter(memory[n // 2 :])}[how]
        optimizer = cls([p, torch.nn.Parameter(torch.ones(3)), q], lr=0.1)
        for _ in range(3):
            p.grad, q.grad = torch.randn(p.shape), torch.randn(q.shape)
            optimizer.step()
        results.append(memory)
    torch.testing.assert_close(*results)
