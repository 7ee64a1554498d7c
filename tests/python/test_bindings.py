"""The compiled module is safe whatever it is given: every error names an argument, and none prints a tensor."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from torchweld import _cpu, ops, optim
from torchweld.ops._attention import Options
from torchweld.ops._linear_cross_entropy import LossOptions
from torchweld.ops._norm import Norm
from torchweld.ops._optimizer import Step
from torchweld.ops.adamw import AdamWLists, AdamWOptions
from torchweld.ops.sgd import SgdLists, SgdOptions

STEP = Step(0.1, None, 0.0, False, 0.0, None, None, None, False, None)


def adamw(params: Any, grads: Any) -> Any:
    zeros, steps = [torch.zeros_like(p) for p in params], [torch.zeros(()) for _ in params]
    lists = AdamWLists(params, grads, zeros, list(map(torch.clone, zeros)), [], steps, [])
    return _cpu.adamw_(lists, AdamWOptions(0.9, 0.99, 1e-8, decoupled=True), STEP, None)


class Quiet(Tensor):
    """A tensor that is not to be printed."""

    def __repr__(self) -> str:  # type: ignore[override]
        raise AssertionError("printed")


def test_every_function_names_its_arguments_and_prints_none() -> None:
    tensor = torch.ones(3).as_subclass(Quiet)
    for name, function in vars(_cpu).items():
        if not callable(function):
            continue
        count = len(inspect.signature(function).parameters)
        with pytest.raises(TypeError, match=rf"^\[{name}\] expected {count} arguments, but got {count + 1}$"):
            function(*[tensor] * (count + 1))
        # Whole calls and nodes take any object: it makes them not common.
        if count and not name.startswith(("allow_whole_", "whole_", "node_", "method")):
            with pytest.raises(TypeError, match=rf"^\[{name}\] .*expected .*, but got (object|Quiet)"):
                function(*[tensor] * (count - 1), object())


@pytest.mark.parametrize(
    "grads",
    [
        lambda ts: (t.clone() for t in ts),
        dict.fromkeys,
        lambda ts: map(torch.clone, ts),
        set,
        torch.stack,
        lambda ts: None,
        lambda ts: "ab",
    ],
    ids=["generator", "dict", "map", "set", "tensor", "None", "string"],
)
def test_only_a_list_or_tuple_holds_its_tensors(grads: Callable[[list[Tensor]], Any]) -> None:
    params = [torch.zeros(5), torch.zeros(5)]
    with pytest.raises(TypeError, match=r"^\[adamw_\] grads: expected a list or tuple of torch.Tensor, but got"):
        adamw(params, grads([torch.ones(5), torch.ones(5)]))
    assert not any(p.any() for p in params)


def test_a_sequence_that_makes_its_tensors_is_refused() -> None:
    class Temporaries:
        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> Tensor | None:
            if index > 5:
                raise IndexError
            return torch.ones(1, 2, 5, 5) if index == 0 else None

    q = torch.ones(1, 2, 5, 8)
    with pytest.raises(TypeError, match=r"^\[attention_forward\] modifiers: expected a tuple \(bias, alibi_slopes, "):
        modifiers: Any = Temporaries()
        _cpu.attention_forward(q, q, q, modifiers, Options(1.0), q.clone(), None, None)


def test_arguments_may_be_named_in_any_order() -> None:
    x = torch.randn(9)
    expected, found = torch.empty(9), torch.empty(9)
    _cpu.gelu_forward(x, True, expected)
    _cpu.gelu_forward(x, output=found, exact=True)
    assert torch.equal(found, expected)
    found.zero_()
    fresh: dict[str, Any] = {"".join(["out", "put"]): found, "exact": True, "".join(["in", "put"]): x}  # not interned
    _cpu.gelu_forward(**fresh)
    assert torch.equal(found, expected)
    function: Any = _cpu.gelu_forward
    signature = r"gelu_forward\(input, exact, output\)"
    with pytest.raises(TypeError, match=rf"^\[gelu_forward\] out: expected each of {signature} once, but got another"):
        function(x, True, out=found)
    with pytest.raises(
        TypeError, match=rf"^\[gelu_forward\] input: expected each of {signature} once, but got it twice"
    ):
        function(x, True, input=found)
    with pytest.raises(TypeError, match=r"^\[gelu_forward\] expected 3 arguments, but got 2$"):
        function(x, exact=True)


def test_a_field_of_a_record_is_named() -> None:
    x = torch.ones(4, 8)
    for norm, message in (
        (Norm(8, 1e-5), None),
        (Norm("8", 1e-5), "cols: expected an integer of 64 bits, but got str"),  # type: ignore[arg-type]
        (Norm(8, x), "eps: expected a number, but got Tensor"),  # type: ignore[arg-type]
        ((8, 1e-5), r"norm: expected a tuple \(cols, eps, centred, weight_offset, dropout_p\), but got tuple"),
        (None, r"norm: expected a tuple \(cols, .*, but got NoneType"),
    ):
        call = partial(_cpu.layer_norm_forward, x, None, None, None, None, norm, None, x.clone(), None, None)  # type: ignore[arg-type]
        if message is None:
            call()
        else:
            with pytest.raises(TypeError, match=rf"^\[layer_norm_forward\] {message}$"):
                call()


def test_a_list_may_change_while_a_kernel_runs() -> None:
    params, grads = [torch.zeros(1 << 16) for _ in range(64)], [torch.ones(1 << 16) for _ in range(64)]
    done = threading.Event()

    def disturb() -> None:
        while not done.is_set():
            grads.clear()
            grads.extend(torch.ones(1 << 16) for _ in range(64))

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for _ in range(20):
            try:
                _cpu.sgd_(SgdLists(params, grads, [], []), SgdOptions(0.0, 0.0, False, False), STEP, None)
            except ValueError as error:
                assert "64 tensors" in str(error)
    finally:
        done.set()
        thread.join()
    assert all(torch.equal(p, params[0]) for p in params)


def test_a_number_that_changes_a_tensor_changes_it_before_it_is_read() -> None:
    class Shrinks:
        def __float__(self) -> float:
            x.resize_(0)
            x.untyped_storage().resize_(0)
            return 1e-5

    x, out = torch.ones(64, 64), torch.empty(64, 64)
    with pytest.raises(ValueError, match="output: expected 0 elements"):
        eps: Any = Shrinks()
        _cpu.layer_norm_forward(x, None, None, None, None, Norm(64, eps), None, out, None, None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _cpu.layer_norm_workspace(5, 0, True, 0), "cols: expected at least 0 and 1, but got 5 and 0"),
        (lambda: _cpu.layer_norm_workspace(-1, 3, True, 0), "cols: expected at least 0 and 1, but got -1 and 3"),
        (lambda: _cpu.layer_norm_forward_workspace(5, 0, 0), "cols: expected at least 0 and 1"),
        (
            lambda: _cpu.cross_entropy_forward(
                torch.ones(2, 0), torch.zeros(2, dtype=torch.int64), 0, 0.0, torch.ones(2), torch.ones(2, 2)
            ),
            "logits: expected at least one class",
        ),
        (
            lambda: _cpu.grad_norm(
                [torch.ones(3)], None, torch.ones((), dtype=torch.float64).expand(_cpu.GRAD_NORM_BLOCKS),
                torch.ones(()), None,
            ),
            "partial: expected a contiguous tensor",
        ),
        (
            lambda: _cpu.grad_norm(
                [torch.ones(3)], None, torch.ones(_cpu.GRAD_NORM_BLOCKS, dtype=torch.int64), torch.ones(()), None
            ),
            "partial: expected dtype float64, but got int64",
        ),
    ],
)  # fmt: skip
def test_sizes_that_would_divide_by_zero_or_leave_memory_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_class_outside_of_the_logits_is_refused() -> None:
    logits, loss, stats = torch.ones(3, 4), torch.ones(3), torch.ones(2, 3)
    for bad in (4, -1, 2**62):
        target = torch.tensor([0, bad, 1])
        with pytest.raises(
            IndexError, match=rf"expected classes in \[0, 4\) or ignore_index -100, but got {bad} in row 1"
        ):
            _cpu.cross_entropy_forward(logits, target, -100, 0.0, loss, stats)
        wanted, weight, options = [None] * 3, torch.ones(4, 4), LossOptions(-100, 0.0, 0.0, 0.0)
        with pytest.raises(IndexError, match=rf"^\[linear_cross_entropy\] target: .*, but got {bad} in row 1"):
            _cpu.linear_cross_entropy(logits, weight, None, target, options, None, loss, *wanted)


def test_lazily_negated_integers_are_negated() -> None:
    logits, classes = torch.randn(4, 5), torch.tensor([1, 2, 3, 4])
    expected = torch.nn.functional.cross_entropy(logits, classes)
    torch.testing.assert_close(ops.cross_entropy(logits, torch._neg_view(-classes)), expected)
    packed, lengths = torch.randn(5, 2, 8), torch.tensor([0, 2, 5], dtype=torch.int32)
    lazy = torch._neg_view(-lengths)
    torch.testing.assert_close(
        ops.attention(packed, packed, packed, cu_seqlens_q=lazy, cu_seqlens_k=lazy),
        ops.attention(packed, packed, packed, cu_seqlens_q=lengths, cu_seqlens_k=lengths),
    )
    q, cache, table, room = packed[None, :2], packed[None], torch.zeros(1, 1).int(), torch.full((1,), 5).int()
    torch.testing.assert_close(
        ops.paged_attention(q, cache, cache, torch._neg_view(-table), torch._neg_view(-room)),
        ops.paged_attention(q, cache, cache, table, room),
    )
    seed, x = torch.tensor([7]), torch.randn(4, 8)
    for function in (ops.add_layer_norm, ops.add_rms_norm):
        lazily, eagerly = (function(x, x, (8,), dropout_p=0.5, seed=s) for s in (torch._neg_view(-seed), seed))
        torch.testing.assert_close(lazily, eagerly)


def test_an_optimizer_takes_parameters_from_a_generator() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optim.SGD((w for w in [weight]), lr=0.5).step()
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.5))
