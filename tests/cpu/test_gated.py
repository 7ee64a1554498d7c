"""swiglu and geglu: exact by the one rule, the same bits always, and ops like any other to torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from by_exponent import by_exponent, hold_by_row
from torchweld import _cpu, backend, ops, reference
from torchweld.testing import Case, Oracle, cases

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Ours, its definition, and what torch has of it.
FORMS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., Tensor]]] = {
    "swiglu": (ops.swiglu, reference.swiglu, functional.silu),
    "geglu": (ops.geglu, reference.geglu, functional.gelu),
    "geglu tanh": (
        partial(ops.geglu, approximate="tanh"),
        partial(reference.geglu, approximate="tanh"),
        partial(functional.gelu, approximate="tanh"),
    ),
}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> tuple[Any, Any, Any]:
    return FORMS[request.param]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases("swiglu") + cases("geglu"), ids=lambda c: f"{c.op} {c.name}")
def test_parity(case: Case, dtype: torch.dtype, each_isa: Iterator[str]) -> None:
    """Output and gradients, on every instruction set of this CPU."""
    oracle = Oracle(case, dtype)
    for _ in each_isa:
        oracle.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_exponent(dtype: torch.dtype, form: tuple[Any, Any, Any], each_isa: Iterator[str]) -> None:
    """Every number of 16 bits as a gate, and of float32 every exponent, beside an ordinary up."""
    gate = by_exponent(dtype)
    up = torch.randn(gate.shape, generator=torch.Generator().manual_seed(0)).to(dtype)

    def run(function: Callable[..., Tensor], gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        leaves = gate.detach().requires_grad_(), up.detach().requires_grad_()
        y = function(*leaves)
        return y.detach(), *torch.autograd.grad(y.sum(), leaves)

    ours, definition, activation = form
    theirs = run(lambda g, u: activation(g) * u, gate, up)
    exact = run(definition, gate.double(), up.double())
    for isa in each_isa:
        for name, got, its, right in zip(("y", "dgate", "dup"), run(ours, gate, up), theirs, exact, strict=True):
            hold_by_row(got, its, right, f"{name} on {isa}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_exponent_of_up(dtype: torch.dtype, each_isa: Iterator[str]) -> None:
    """The output alone is nonlinear in neither; up's own infinities and NaN go through."""
    up = by_exponent(dtype)
    gate = torch.full_like(up, 1.5)
    theirs, exact = functional.silu(gate) * up, reference.swiglu(gate.double(), up.double())
    for isa in each_isa:
        hold_by_row(ops.swiglu(gate, up), theirs, exact, isa)


@pytest.mark.parametrize("packed", [False, True])
def test_bits_do_not_depend_on_threads_or_packing(packed: bool, form: tuple[Any, Any, Any], threads: None) -> None:
    gate, up, dy = (torch.randn(37, 1003) for _ in range(3))
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        leaves = [torch.cat((gate, up), -1)] if packed and count != 2 else [gate.clone(), up.clone()]
        for leaf in leaves:
            leaf.requires_grad_()
        y = form[0](*leaves)
        results.append((y.detach(), torch.cat(torch.autograd.grad(y, leaves, dy), -1)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_views_of_one_tensor_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    right = backend.kernels["cpu"].gated_forward
    monkeypatch.setattr(
        backend, "kernels", {"cpu": _Noting(right, lambda gate, up, **_: seen.append((gate.data_ptr(), up.data_ptr())))}
    )
    both = torch.randn(3, 5, 64)
    gate, up = both.chunk(2, -1)
    ops.swiglu(gate, up)
    ops.swiglu(both)
    assert seen == [(gate.data_ptr(), up.data_ptr())] * 2


class _Noting:
    def __init__(self, right: Callable[..., None], note: Callable[..., None]) -> None:
        self.right, self.note = right, note

    def gated_forward(self, **arguments: Any) -> None:
        self.note(**arguments)
        self.right(**arguments)


def test_inputs_of_two_dtypes_are_promoted(form: tuple[Any, Any, Any]) -> None:
    gate, up = torch.randn(4, 8).bfloat16(), torch.randn(4, 8)
    got = form[0](gate, up)
    assert got.dtype is torch.float32
    torch.testing.assert_close(got, form[2](gate.float()) * up)


def test_zeros_keep_their_sign(form: tuple[Any, Any, Any]) -> None:
    gate = torch.tensor([0.0, -0.0, -1e30])
    assert form[0](gate, torch.ones(3)).signbit().tolist() == [False, True, True]


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_an_op_like_any_other(activation: str) -> None:
    gate, up, dy = (torch.randn(4, 34) for _ in range(3))
    forward, backward = torch.ops.torchweld.gated_forward.default, torch.ops.torchweld.gated_backward.default
    torch.library.opcheck(forward, (gate, up, activation))
    torch.library.opcheck(forward, (gate.mT.contiguous().mT, None, activation))
    torch.library.opcheck(backward, (dy, gate, up.mT.contiguous().mT, activation))
    torch.library.opcheck(backward, (dy[:, :17], gate, None, activation))


@pytest.mark.slow
def test_gradcheck_and_compile(form: tuple[Any, Any, Any]) -> None:
    ours = form[0]
    wide = [torch.randn(3, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(ours, wide) and torch.autograd.gradcheck(ours, wide[:1])
    for count in (1, 2):
        leaves = [torch.randn(4, 34, requires_grad=True) for _ in range(count)]
        call = lambda *t: ours(*(x.sin() for x in t)).cos()  # noqa: E731
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        expected = call(*leaves)
        torch.testing.assert_close(compiled(*leaves), expected)
        torch.testing.assert_close(
            torch.autograd.grad(compiled(*leaves).sum(), leaves), torch.autograd.grad(expected.sum(), leaves)
        )


@pytest.mark.parametrize("packed", [False, True])
def test_double_backward(packed: bool, form: tuple[Any, Any, Any]) -> None:
    ours, definition, _ = form
    leaves = [torch.randn(6, 40, requires_grad=True) for _ in range(1 if packed else 2)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    seconds = []
    for function, inputs in ((ours, leaves), (definition, wide)):
        first = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.sin().sum() for g in first), inputs))  # type: ignore[arg-type]
    for got, right in zip(*seconds, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=1e-4)


ROWS = torch.ones(4, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.swiglu(torch.ones(4, 7)), RuntimeError, r"\[swiglu\] gate: expected an even last dimension"),
        (lambda: ops.swiglu(torch.ones(())), RuntimeError, r"\[swiglu\] gate: expected an even last dimension"),
        (lambda: ops.swiglu(ROWS, ROWS[:2]), RuntimeError, r"up: expected gate's shape \[4, 8\], but got \[2, 8\]"),
        (lambda: ops.geglu(ROWS, ROWS[:, :1]), RuntimeError, r"\[geglu\] up: expected gate's shape"),
        (lambda: ops.swiglu(ROWS, ROWS.to("meta")), RuntimeError, r"up: expected gate's device cpu, but got meta"),
        (lambda: ops.swiglu(ROWS.long()), TypeError, r"gate: expected a floating-point dtype, but got torch\.int64"),
        (lambda: ops.swiglu(ROWS, ROWS.int()), TypeError, r"up: expected a floating-point dtype"),
        (lambda: ops.swiglu(ROWS.to_sparse()), TypeError, r"gate: expected a dense tensor"),
        (lambda: ops.geglu(ROWS, approximate="erf"), RuntimeError, r"approximate: expected 'none' or 'tanh'"),
        (lambda: ops.swiglu([1.0]), TypeError, r"gate: expected a torch.Tensor, but got list"),  # type: ignore[arg-type]
        (lambda: ops.swiglu(ROWS, 3), TypeError, r"up: expected a torch.Tensor, but got int"),  # type: ignore[arg-type]
        (
            lambda: torch.ops.torchweld.gated_forward(ROWS, ROWS, "relu"),
            ValueError,
            r"\[gated_forward\] activation: expected silu, gelu or gelu_tanh, but got relu",
        ),
        (
            lambda: _cpu.gated_forward(ROWS, ROWS[:2], "silu", ROWS),
            ValueError,
            r"\[gated_forward\] up: expected shape \[4, 8\], but got \[2, 8\]",
        ),
        (
            lambda: _cpu.gated_forward(ROWS[0], ROWS, "silu", ROWS),
            ValueError,
            r"\[gated_forward\] gate: expected 2 dimensions, but got shape \[8\]",
        ),
        (
            lambda: _cpu.gated_backward(ROWS, ROWS, ROWS, "silu", ROWS[:1].expand(4, 8), ROWS.clone()),
            ValueError,
            r"\[gated_backward\] dgate: expected rows that do not overlap, but got strides \[0, 1\]",
        ),
    ],
)
def test_bad_input_is_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
