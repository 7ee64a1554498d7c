"""dropout: exact by the one rule, the mask of its definition, the same bits always, an op like any other to torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from leaves import gradient
from thread_counts import hold_bits
from torchweld import _cpu, nn, ops, reference
from torchweld.reference.philox import dropout_factors
from torchweld.testing import Case, Oracle, cases

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED = torch.tensor([-0x123456789ABCDEF])
INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases("dropout"), ids=lambda c: c.name)
def test_parity(case: Case, dtype: torch.dtype, each_isa: Iterator[str]) -> None:
    """Output and gradient, on every instruction set of this CPU."""
    oracle = Oracle(case, dtype)
    for _ in each_isa:
        oracle.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mask_is_that_of_the_definition(dtype: torch.dtype, each_isa: Iterator[str]) -> None:
    shapes = ((3, 1), (5, 66), (2, 3, 65), (2, 4097), (130,), ())
    expected = [reference.dropout(torch.ones(shape, dtype=dtype), 0.4, seed=SEED) for shape in shapes]
    for _ in each_isa:
        for shape, right in zip(shapes, expected, strict=True):
            x = torch.ones(shape, dtype=dtype, requires_grad=True)
            y = ops.dropout(x, 0.4, seed=SEED)
            assert torch.equal(y, right)
            y.backward(torch.ones_like(y))
            assert torch.equal(gradient(x), right)


def test_it_drops_as_add_layer_norm_does() -> None:
    x, residual = torch.randn(4, 9, 72), torch.randn(4, 9, 72)
    _, total = ops.add_layer_norm(x, residual, (72,), dropout_p=0.2, seed=SEED)
    torch.testing.assert_close(total, residual + ops.dropout(x, 0.2, seed=SEED))


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_the_share_that_is_dropped(p: float) -> None:
    """Within five deviations of p; neighbours in rows and columns, and other seeds, are independent."""
    torch.manual_seed(0)
    count, ones = 1000 * 1000, torch.ones(1000, 1000)
    a, b = (ops.dropout(ones, p) == 0 for _ in range(2))
    for dropped, share in ((a, p), (a & b, p * p), (a[1:] & a[:-1], p * p), (a[:, 1:] & a[:, :-1], p * p)):
        assert abs(dropped.sum() - share * dropped.numel()) < 5 * math.sqrt(share * (1 - share) * count)
    assert a.sum(0).max() < 1000 and a.sum(1).max() < 1000


def test_bits_do_not_depend_on_threads() -> None:
    wide, flat = torch.randn(7, 10007, requires_grad=True), torch.randn(100003, requires_grad=True)

    def run() -> tuple[torch.Tensor, ...]:
        y, z = ops.dropout(wide, 0.1, seed=SEED), ops.dropout(flat, 0.1, seed=SEED)
        return y.detach(), z.detach(), *torch.autograd.grad(y.square().sum() + z.square().sum(), (wide, flat))

    hold_bits(run)


def test_nothing_to_drop_is_the_input_itself() -> None:
    x, empty = torch.randn(3, 5), torch.randn(3, 0)
    before = torch.get_rng_state()
    assert ops.dropout(x, 0.0) is x and ops.dropout(x, 0.5, False) is x and ops.dropout(empty, 0.5) is empty
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("p", [0.5, 1.0])
def test_what_is_dropped_is_multiplied_by_zero(dtype: torch.dtype, p: float) -> None:
    """As torch does: NaN stays, infinity becomes NaN, a zero keeps its sign."""
    x = torch.tensor([NAN, INF, -INF, -1.0, 2.0] * 40, dtype=dtype)
    y = ops.dropout(x, p, seed=SEED)
    kept = dropout_factors(SEED, 1, 200, p)[0] != 0
    assert kept.any() == (p < 1) and not kept.all()
    torch.testing.assert_close(y, torch.where(kept, x * 2, x * 0), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(y.signbit() & ~y.isnan(), (x < 0) & ~y.isnan())
    torch.testing.assert_close(ops.dropout(x, 1.0), torch.dropout(x, 1.0, True), rtol=0, atol=0, equal_nan=True)


def test_float64_runs_on_the_definition() -> None:
    x = torch.randn(6, 33, dtype=torch.float64, requires_grad=True)
    y = ops.dropout(x, 0.3, seed=SEED)
    assert torch.equal(y, x * dropout_factors(SEED, 6, 33, 0.3)) and y.dtype is torch.float64
    assert torch.autograd.gradcheck(lambda t: ops.dropout(t, 0.3, seed=SEED), x)
    assert torch.autograd.gradgradcheck(lambda t: ops.dropout(t, 0.3, seed=SEED).square(), x)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_in_place(dtype: torch.dtype) -> None:
    x = torch.randn(5, 70, dtype=dtype, requires_grad=True)
    expected = ops.dropout(x, 0.3, seed=SEED)

    def run(x: torch.Tensor) -> torch.Tensor:
        y = x.t().clone().t()
        found = ops.dropout(y, 0.3, True, True, seed=SEED)
        return y if found is y else found * torch.nan

    compiled = [torch.compile(run, backend="aot_eager", fullgraph=True)] if dtype is torch.float32 else []
    for y in [each(x) for each in (run, *compiled)]:
        assert torch.equal(y, expected)
        assert torch.equal(*(torch.autograd.grad(t.square().sum(), x, retain_graph=True)[0] for t in (y, expected)))


def test_in_place_as_torch_does() -> None:
    leaf = torch.randn(5, 70, requires_grad=True)
    for dropout in (ops.dropout, torch.nn.functional.dropout):
        for p, training in ((0.0, True), (0.5, False)):
            assert dropout(leaf, p, training, inplace=True) is leaf and leaf._version == 0
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad is being used in an in-place"):
            dropout(leaf, 0.5, inplace=True)
        with pytest.raises(RuntimeError, match="unsupported operation: more than one element of the written-to tensor"):
            dropout(torch.randn(1, 70).expand(5, 70), 0.5, inplace=True)
        saved = leaf * 1
        squared = saved.square().sum()
        dropout(saved, 0.5, inplace=True)
        with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
            squared.backward()
    with pytest.raises(TypeError, match=r"\[dropout\] inplace: expected"):
        ops.dropout(leaf, inplace="yes")  # type: ignore[arg-type]


def test_nothing_but_the_seed_is_kept() -> None:
    kept: list[torch.Tensor] = []

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        ops.dropout(torch.randn(64, 64, requires_grad=True))
    assert [(t.dtype, t.shape) for t in kept] == [(torch.int64, (1,))]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_sees_the_same_mask(reentrant: bool) -> None:
    layer = nn.Dropout(0.5)

    def block(x: torch.Tensor) -> torch.Tensor:
        return layer(ops.dropout(x, 0.2)).square()

    leaf = torch.randn(64, 64, requires_grad=True)
    torch.manual_seed(3)
    (right,) = torch.autograd.grad(block(leaf).sum(), leaf)
    torch.manual_seed(3)
    y: Any = checkpoint(block, leaf, use_reentrant=reentrant, preserve_rng_state=True)
    torch.randn(5)
    y.sum().backward()
    assert torch.equal(gradient(leaf), right) and right.count_nonzero() > 0


def test_double_backward_and_batched_gradients() -> None:
    x = torch.randn(4, 40, requires_grad=True)
    factors = dropout_factors(SEED, 4, 40, 0.25).float()
    y = ops.dropout(x, 0.25, seed=SEED)
    (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 6 * factors**3 * x.detach())
    rows = torch.randn(3, 4, 40)
    (batched,) = torch.autograd.grad(ops.dropout(x, 0.25, seed=SEED), x, rows, is_grads_batched=True)
    torch.testing.assert_close(batched, rows * factors)


@pytest.mark.slow
def test_an_op_like_any_other() -> None:
    x = torch.randn(4, 33)
    torch.library.opcheck(torch.ops.torchweld.dropout.default, (x, SEED, 0.3))
    torch.library.opcheck(torch.ops.torchweld.dropout.default, (x.mT.contiguous().mT, SEED, 1.0))
    leaf = torch.randn(4, 33, requires_grad=True)

    def run(t: torch.Tensor) -> torch.Tensor:
        return ops.dropout(t.sin(), 0.3, seed=SEED).cos()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(leaf), run(leaf))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(leaf).sum(), leaf), torch.autograd.grad(run(leaf).sum(), leaf)
    )
    drawn = torch.compile(nn.Dropout(0.5), fullgraph=True, backend="aot_eager", dynamic=True)
    a, b = drawn(leaf), drawn(leaf)
    assert not torch.equal(a, b)
    assert torch.equal(torch.autograd.grad(a.sum(), leaf)[0] != 0, a != 0)


def test_vmap_draws_as_it_is_told() -> None:
    x = torch.ones(3, 8, 16)
    a, b, c = torch.func.vmap(ops.dropout, randomness="different")(x)
    assert not torch.equal(a, b) and not torch.equal(b, c)
    a, b, c = torch.func.vmap(ops.dropout, randomness="same")(x)
    assert torch.equal(a, b) and torch.equal(b, c)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(ops.dropout)(x)


def test_the_module_is_torchs() -> None:
    ours, theirs = nn.Dropout(0.25), torch.nn.Dropout(0.25)
    x = torch.randn(64, 64)
    assert repr(ours) == repr(theirs) == "Dropout(p=0.25, inplace=False)" and not ours.state_dict()
    torch.manual_seed(1)
    y = ours(x)
    torch.manual_seed(1)
    assert torch.equal(y, ops.dropout(x, 0.25)) and not torch.equal(y, x)
    assert ours.eval()(x) is x and nn.Dropout(0.0)(x) is x
    # What is left to torch: in place, short, float64, nested.
    for make, given in ((lambda m: m.Dropout(0.5, inplace=True), x), (lambda m: m.Dropout(0.5), x[:2, :2])):
        found = []
        for module in (nn, torch.nn):
            torch.manual_seed(2)
            copy = given.clone()
            found.append(make(module)(copy))
            assert (found[-1] is copy) == make(module).inplace
        assert torch.equal(*found)
    for given in (x.double(), torch.nested.nested_tensor([x[:2], x], layout=torch.jagged)):
        torch.manual_seed(2)
        y = ours.train()(given)
        torch.manual_seed(2)
        right = theirs(given)
        assert torch.equal(*(t.values() if t.is_nested else t for t in (y, right)))
    with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
        nn.Dropout(1.5)


def test_bad_input_is_named() -> None:
    x, untyped = torch.ones(3), vars(ops)["dropout"]
    for error, text, call in (
        (ValueError, r"\[dropout\] p: expected a probability from 0 to 1, but got 1.5", lambda: ops.dropout(x, 1.5)),
        (ValueError, r"\[dropout\] p: expected a probability from 0 to 1, but got nan", lambda: ops.dropout(x, NAN)),
        (TypeError, r"\[dropout\] p: expected a number, but got 'half'", lambda: untyped(x, "half")),
        (TypeError, r"\[dropout\] training: expected a bool, but got 'yes'", lambda: untyped(x, 0.5, "yes")),
        (TypeError, r"\[dropout\] input: expected a torch.Tensor, but got list", lambda: untyped([1.0])),
        (TypeError, r"input: expected a floating-point dtype, but got torch\.int64", lambda: ops.dropout(x.long())),
        (
            RuntimeError,
            r"\[dropout\] seed: expected one int64 element on cpu, but got torch.float32 of shape \[3\] on cpu",
            lambda: ops.dropout(x, seed=x),
        ),
        (
            TypeError,
            r"\[dropout\] input: expected a dense tensor, but got a sparse_coo one; convert it with x.to_dense\(\)",
            lambda: ops.dropout(x.to_sparse()),
        ),
        (
            ValueError,
            "output: expected 3 elements, but got shape",
            lambda: _cpu.dropout(x, SEED, 0.5, torch.ones(4)),
        ),
        (ValueError, "p: expected a probability from 0 to 1, but got 2", lambda: _cpu.dropout(x, SEED, 2.0, x)),
    ):
        with pytest.raises(error, match=text):
            call()


def test_the_layout_is_that_of_torch_and_the_mask_is_not_of_it() -> None:
    heads, image = (
        torch.randn(2, 5, 3, 8).transpose(1, 2),
        torch.randn(2, 6, 4, 5).to(memory_format=torch.channels_last),
    )
    for x in (heads, image, torch.randn(7, 9).t(), torch.randn(10, 12)[::2, ::3].t(), torch.randn(1, 9).expand(4, 9)):
        x.requires_grad_()
        y = ops.dropout(x, 0.5, seed=SEED)
        assert y.stride() == torch.nn.functional.dropout(x).stride()
        assert torch.equal(y, ops.dropout(x.contiguous(), 0.5, seed=SEED))
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert torch.equal(dx, reference.dropout(torch.ones(x.shape), 0.5, seed=SEED))
