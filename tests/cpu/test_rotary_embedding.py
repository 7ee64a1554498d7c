"""rotary_embedding: exact by the one rule, the same bits always, in place, and an op like any other to torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from by_exponent import by_exponent, hold_by_row
from thread_counts import hold_bits
from torchweld import _cpu, ops, reference
from torchweld.ops._rotary import Rotation, Tables
from torchweld.reference.rotary_embedding import rotary_tables
from torchweld.testing import Case, Oracle, cases

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Q, K = torch.randn(2, 4, 7, 16), torch.randn(2, 2, 7, 16)
COS, SIN = rotary_tables(torch.arange(7), 16)
TABLES = Tables(COS, SIN, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases("rotary_embedding"), ids=lambda c: c.name)
def test_parity(case: Case, dtype: torch.dtype, each_isa: Iterator[str]) -> None:
    """Outputs and gradients, on every instruction set of this CPU."""
    oracle = Oracle(case, dtype)
    for _ in each_isa:
        oracle.check()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_exponent(dtype: torch.dtype, interleaved: bool, each_isa: Iterator[str]) -> None:
    """Every number of 16 bits beside one of its own exponent, and of float32 every exponent."""
    x = by_exponent(dtype)
    query, angle = x.view(1, 1, *x.shape), torch.linspace(0.1, 3, x.shape[0])
    columns = x.shape[1] // 2
    cos, sin = (t[:, None].expand(-1, columns) for t in (angle.cos(), angle.sin()))
    exact = reference.rotary_embedding(query.double(), None, cos.double(), sin.double(), interleaved=interleaved)
    theirs = reference.rotary_embedding(query, None, cos, sin, interleaved=interleaved)
    for isa in each_isa:
        ours = ops.rotary_embedding(query, None, cos, sin, interleaved=interleaved)
        hold_by_row(ours[0, 0], theirs[0, 0], exact[0, 0], isa)


def test_bits_do_not_depend_on_threads() -> None:
    query, key = torch.randn(3, 4, 333, 48, requires_grad=True), torch.randn(3, 2, 333, 48, requires_grad=True)

    def run() -> list[Tensor]:
        out = ops.rotary_embedding(query, key)
        return [*out, *torch.autograd.grad(sum(t.sin().sum() for t in out), (query, key))]

    hold_bits(run)


def test_the_definition_turns_by_the_angle() -> None:
    """A pair as a complex number, times exp(i position / base^(2 i / size)); whatever the order of the elements."""
    query = torch.randn(1, 1, 5, 8, dtype=torch.float64)
    angles = torch.arange(5.0, dtype=torch.float64)[:, None] * 100.0 ** (-torch.arange(0, 8, 2).double() / 8)
    turn = torch.polar(torch.ones_like(angles), angles)
    halves = torch.complex(*query.chunk(2, -1)) * turn
    pairs = torch.complex(query[..., ::2].contiguous(), query[..., 1::2].contiguous()) * turn
    expected = torch.cat((halves.real, halves.imag), -1), torch.stack((pairs.real, pairs.imag), -1).flatten(-2)
    for interleaved in (False, True):
        got = reference.rotary_embedding(query, base=100.0, interleaved=interleaved)
        torch.testing.assert_close(got, expected[interleaved], rtol=1e-6, atol=1e-6)


def test_products_depend_on_the_distance_alone() -> None:
    query, key = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 1, 64)
    scores = []
    for at in (0, 1000, 70000):
        q, k = (ops.rotary_embedding(t, position_ids=torch.tensor([at + far])) for t, far in ((query, 0), (key, 9)))
        scores.append(float((q * k).sum()))
    assert max(scores) - min(scores) < 1e-4


def test_a_fake_position_of_a_table_is_refused_before_memory_is_touched() -> None:
    for bad in (-1, 7, 2**40):
        ids = torch.tensor([0, 1, 2, bad, 4, 5, 6])
        query = Q.clone()
        with pytest.raises(
            ValueError, match=rf"\[rotary_embedding\] position_ids: expected positions from 0 to 6.*{bad}"
        ):
            ops.rotary_embedding(query, None, COS, SIN, position_ids=ids, inplace=True)
        assert torch.equal(query, Q)


@pytest.mark.parametrize("seq_dim", [-2, -3])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [16, 6])
def test_in_place(seq_dim: int, interleaved: bool, rotary_dim: int) -> None:
    options: dict[str, Any] = {"seq_dim": seq_dim, "interleaved": interleaved, "rotary_dim": rotary_dim}
    for wide in (False, True):  # heads that lie between others in memory, as those of one projection
        query, key = (torch.randn(2, *t, 16) for t in (((4, 7), (2, 7)) if seq_dim == -2 else ((7, 4), (7, 2))))
        if wide:
            query, key = (torch.cat((t, t), -1)[..., :16] for t in (query, key))
        expected = ops.rotary_embedding(query, key, **options)
        versions = query._version, key._version
        found = ops.rotary_embedding(query, key, inplace=True, **options)
        assert found[0] is query and found[1] is key
        assert (query._version, key._version) == (versions[0] + 1, versions[1] + 1)
        assert torch.equal(query, expected[0]) and torch.equal(key, expected[1])
        (only,) = (ops.rotary_embedding(t, inplace=True) for t in (query,))
        assert only is query


def test_in_place_under_autograd() -> None:
    leaf = torch.randn(2, 7, 3, 4, 16, requires_grad=True)

    def run(inplace: bool) -> Tensor:
        query, key, value = (leaf * 1).unbind(2)[0], (leaf * 1)[:, :, 1], leaf[:, :, 2]
        query = query.clone()
        turned = ops.rotary_embedding(query, key, seq_dim=-3, inplace=inplace)
        assert (turned[0] is query) == inplace
        (grad,) = torch.autograd.grad((turned[0] * turned[1] * value).sum(), leaf)
        return grad

    torch.testing.assert_close(run(True), run(False))
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        ops.rotary_embedding(Q.clone().requires_grad_(), inplace=True)
    with pytest.raises(RuntimeError, match="single memory location"):
        ops.rotary_embedding(Q[:1, :1].expand(2, 4, 7, 16), inplace=True)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_outputs_keep_the_strides(interleaved: bool) -> None:
    query = torch.randn(2, 7, 4, 16).transpose(1, 2)
    got = ops.rotary_embedding(query, interleaved=interleaved)
    assert got.stride() == query.stride()


def test_learned_tables_have_gradients() -> None:
    cos, sin = COS.clone().requires_grad_(), SIN.clone().requires_grad_()
    query = Q.clone().requires_grad_()
    out = ops.rotary_embedding(query, None, cos, sin)
    for grad in torch.autograd.grad(out.square().sum() + out.sum(), (query, cos, sin)):
        assert grad.isfinite().all() and grad.any()


@pytest.mark.slow
def test_an_op_like_any_other() -> None:
    op, op_ = torch.ops.torchweld.rotary_embedding.default, torch.ops.torchweld.rotary_embedding_.default
    ids = torch.randint(7, (2, 7))
    for rest in ((16, False, False), (16, True, False), (8, False, True)):
        cos, sin = rotary_tables(torch.arange(7), int(rest[0]))
        for key, positions in ((K, ids), (None, None), (K.mT.contiguous().mT, ids[0])):
            torch.library.opcheck(op, (Q, key, cos, sin, positions, *rest))
            torch.library.opcheck(op_, (Q.clone(), None if key is None else K.clone(), cos, sin, positions, *rest))


@pytest.mark.slow
@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck_and_compile(interleaved: bool) -> None:
    def call(query: Any, key: Any, inplace: Any = False) -> Any:
        return ops.rotary_embedding(
            query * 1, key * 1, COS, SIN, interleaved=interleaved, rotary_dim=16, inplace=inplace
        )

    wide = [t.double().requires_grad_() for t in (Q, K)]
    assert torch.autograd.gradcheck(call, wide)
    leaves = [t.clone().requires_grad_() for t in (Q, K)]
    expected = call(*leaves)
    for inplace in (False, True):
        compiled = torch.compile(lambda q, k, i=inplace: call(q, k, i), fullgraph=True, backend="aot_eager")
        got = compiled(*leaves)
        torch.testing.assert_close(got, expected)
        grads = (
            torch.autograd.grad(sum(t.sin().sum() for t in out), leaves, retain_graph=True) for out in (got, expected)
        )
        torch.testing.assert_close(*grads)
        with torch.no_grad():
            torch.testing.assert_close(compiled(Q, K), call(Q, K))


@pytest.mark.parametrize("interleaved", [False, True])
def test_double_backward(interleaved: bool) -> None:
    seconds = []
    for of, dtype in ((ops, torch.float32), (reference, torch.float64)):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (Q, K)]
        out = of.rotary_embedding(*leaves, COS.to(dtype), SIN.to(dtype), interleaved=interleaved)
        first = torch.autograd.grad(torch.cat(out, 1).sin().sum(), leaves, create_graph=True)
        seconds.append(torch.autograd.grad(torch.cat(first, 1).square().sum(), leaves))
    for got, right in zip(*seconds, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=1e-4)


def test_gradients_of_one_of_both() -> None:
    for wanted in (0, 1):
        tensors = [t.detach().clone().requires_grad_(i == wanted) for i, t in enumerate((Q, K))]
        out = ops.rotary_embedding(tensors[0], tensors[1], COS, SIN)
        (got,) = torch.autograd.grad(out[wanted].square().sum(), tensors[wanted])
        torch.testing.assert_close(got, 2 * tensors[wanted].detach())  # a turn keeps the length


def untyped(*args: Any, **options: Any) -> Any:
    return ops.rotary_embedding(*args, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: untyped(Q[0]), RuntimeError, r"query: expected 4 dimensions, but got shape \[4, 7, 16\]"),
        (lambda: untyped(Q, K[:1]), RuntimeError, r"key: expected query's shape but for its heads, \[2, 2, 7, 16\]"),
        (lambda: untyped(Q, K, COS), TypeError, r"sin: expected a torch.Tensor beside the other table, but got None"),
        (lambda: untyped(Q, K, COS[:3], SIN), RuntimeError, r"cos: expected 7 rows, a token each.*give position_ids"),
        (lambda: untyped(Q, K, COS[:, :5], SIN), RuntimeError, r"cos: expected 16 columns or 8, an element or a pair"),
        (lambda: untyped(Q, K, COS, SIN.expand(3, 7, 8)), RuntimeError, r"sin: expected 2 dimensions, or 2 in front"),
        (lambda: untyped(Q, K, COS, SIN[0]), RuntimeError, r"sin: expected 2 dimensions, or 2 in front of them"),
        (lambda: untyped(Q, K, COS, SIN.long()), TypeError, r"sin: expected a floating-point dtype"),
        (
            lambda: untyped(Q, K, COS, SIN[:3], position_ids=torch.zeros(7).long()),
            RuntimeError,
            r"sin: expected cos's 7 rows, but got shape \[3, 8\]",
        ),
        (lambda: untyped(Q, rotary_dim=5), ValueError, r"rotary_dim: expected an even number from 2 to 16, but got 5"),
        (lambda: untyped(Q, rotary_dim=18), ValueError, r"rotary_dim: expected an even number from 2 to 16"),
        (lambda: untyped(Q, rotary_dim=0), ValueError, r"rotary_dim: expected an even number from 2 to 16"),
        (lambda: untyped(Q[..., :1]), ValueError, r"rotary_dim: expected an even number from 2 to 1, but got 1"),
        (lambda: untyped(Q, seq_dim=0), ValueError, r"seq_dim: expected -2 or -3, but got 0"),
        (lambda: untyped(Q, base=0), ValueError, r"base: expected a number above 0, but got 0"),
        (lambda: untyped(Q, base="e"), TypeError, r"base: expected a number, but got 'e'"),
        (lambda: untyped(Q, base=math.nan), ValueError, r"base: expected a number above 0, but got nan"),
        (lambda: untyped(Q, inplace="yes"), TypeError, r"inplace: expected a bool, but got 'yes'"),
        (lambda: untyped(Q, position_ids=torch.zeros(7)), TypeError, r"position_ids: expected dtype torch.int64"),
        (
            lambda: untyped(Q, position_ids=torch.zeros(3, 7).long()),
            RuntimeError,
            r"position_ids: expected shape \[7\] or \[2, 7\], but got \[3, 7\]",
        ),
        (lambda: untyped(Q.long()), TypeError, r"query: expected a floating-point dtype, but got torch.int64"),
        (lambda: untyped(Q, K.to("meta")), RuntimeError, r"key: expected query's device cpu, but got meta"),
        (
            lambda: _cpu.rotary_embedding(Q, None, TABLES, Rotation(16, True), Q.clone(), None),
            ValueError,
            r"\[rotary_embedding\] cos: expected 16 columns, but got 8",
        ),
        (
            lambda: _cpu.rotary_embedding(Q, K, TABLES, Rotation(16, False), Q.clone(), None),
            ValueError,
            r"\[rotary_embedding\] key_output: expected one with key alone",
        ),
        (
            lambda: _cpu.rotary_embedding(Q, None, TABLES, Rotation(16, False), Q[:1].expand(2, 4, 7, 16), None),
            ValueError,
            r"\[rotary_embedding\] query_output: expected heads that do not overlap",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
