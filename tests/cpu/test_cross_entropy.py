"""cross_entropy: exact by the one rule, the same bits always, and an op like any other to torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from extreme_logits import each_logits, hold_to_torch
from leaves import gradient
from thread_counts import hold_bits
from torchweld import ops, reference
from torchweld.testing import Case, Oracle, cases

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases("cross_entropy"), ids=lambda c: c.name)
def test_parity(case: Case, dtype: torch.dtype, each_isa: Iterator[str]) -> None:
    """Loss and gradient, on every instruction set of this CPU."""
    oracle = Oracle(case, dtype)
    for _ in each_isa:
        oracle.check()


def test_bits_do_not_depend_on_threads() -> None:
    x, target = torch.randn(301, 4099, requires_grad=True), torch.randint(0, 4099, (301,))

    def run() -> tuple[torch.Tensor, ...]:
        loss = ops.cross_entropy(x, target, reduction="none")
        return loss.detach(), *torch.autograd.grad(loss.sum(), x)

    hold_bits(run)


def test_no_row_counts() -> None:
    """As torch: the mean of nothing is NaN, and its gradient is none to the logits."""
    x = torch.randn(3, 5, requires_grad=True)
    target = torch.full((3,), -100)
    assert ops.cross_entropy(x, target).isnan()
    ops.cross_entropy(x, target, reduction="sum").backward()
    assert torch.equal(gradient(x), torch.zeros(3, 5))


@pytest.mark.parametrize(
    ("shape", "target", "options"),
    [
        ((4, 7), torch.tensor([0, 6, 3, 3]), {"weight": torch.rand(7)}),
        ((4, 7), torch.rand(4, 7).softmax(1), {"label_smoothing": 0.2}),
        ((2, 7, 3), torch.randint(0, 7, (2, 3)), {}),
        ((7,), torch.tensor(3), {}),
    ],
    ids=["weights", "probabilities", "images", "one row"],
)
def test_the_rest_of_torchs_arguments(shape: tuple[int, ...], target: torch.Tensor, options: dict[str, Any]) -> None:
    x = torch.randn(shape)
    torch.testing.assert_close(ops.cross_entropy(x, target, **options), F.cross_entropy(x, target, **options))


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("weight_dtype", [None, *FLOATS], ids=str)
@pytest.mark.parametrize("target_dtype", [torch.int64, *FLOATS], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_dtype_is_torchs(dtype: torch.dtype, target_dtype: torch.dtype, weight_dtype: torch.dtype | None) -> None:
    """For every pair that torch takes; a class weight of another dtype beside class indices is taken here too."""
    x = torch.randn(6, 50).to(dtype).requires_grad_()
    classes = torch.tensor([0, 49, 3, 3, 7, 8])
    target = classes if target_dtype is torch.int64 else torch.rand(6, 50).to(target_dtype)
    weight = None if weight_dtype is None else torch.rand(50).to(weight_dtype)
    for options in ({"reduction": "none"}, {"reduction": "sum"}, {"label_smoothing": 0.1}):
        found = ops.cross_entropy(x, target, weight, **options)
        assert torch.autograd.grad(found.sum(), x)[0].dtype is dtype
        wider = dtype if weight is None else torch.promote_types(dtype, weight.dtype)
        if target_dtype is torch.int64 and wider is not dtype:
            assert found.dtype is wider
            continue
        try:
            expected = F.cross_entropy(x, target, weight, **options)
        except RuntimeError:
            assert target_dtype is torch.int64  # torch takes no narrower weight either
            continue
        assert found.dtype is expected.dtype
        exact = F.cross_entropy(
            x.double(),
            target if target is classes else target.double(),
            None if weight is None else weight.double(),
            **options,
        )
        error, theirs = ((t.double() - exact).abs().max() for t in (found, expected))
        assert error <= 2 * theirs + torch.finfo(found.dtype).eps * exact.abs().max()


def test_no_infinity_where_torch_has_none() -> None:
    x, soft = torch.full((100, 1000), 60.0, dtype=torch.float16), torch.rand(100, 1000)
    x[:, 0] = -60.0
    found, expected = (f(x, soft, reduction="sum") for f in (ops.cross_entropy, F.cross_entropy))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@each_logits
def test_logits_far_out(logits: list[float], smoothing: float) -> None:
    hold_to_torch(logits, smoothing, classes=3)


def test_smoothing_of_logits_whose_sum_is_no_float() -> None:
    x = torch.linspace(-1e37, 0.0, 5000)[None]
    found = ops.cross_entropy(x, torch.tensor([4999]), label_smoothing=0.5)
    exact = F.cross_entropy(x.double(), torch.tensor([4999]), label_smoothing=0.5)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


def test_a_lazily_negated_target() -> None:
    x, target = torch.randn(3, 5, requires_grad=True), torch.tensor([1, 2, 4])
    lazy = torch._neg_view(-target)
    assert lazy.is_neg()
    found, expected = (ops.cross_entropy(x, t) for t in (lazy, target))
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(t, x)[0] for t in (found, expected)))


@pytest.mark.slow
def test_an_op_like_any_other() -> None:
    x, target = torch.randn(5, 33), torch.tensor([0, 32, -100, 7, 1])
    library = torch.ops.torchweld
    torch.library.opcheck(library.cross_entropy_forward.default, (x, target, -100, 0.1))
    _, stats = library.cross_entropy_forward(x, target, -100, 0.1)
    torch.library.opcheck(library.cross_entropy_backward.default, (torch.randn(5), x, target, -100, 0.1, stats))
    wide = torch.randn(5, 33, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: ops.cross_entropy(t, target, label_smoothing=0.1), wide)
    leaf = torch.randn(5, 33, requires_grad=True)
    compiled = torch.compile(lambda t: ops.cross_entropy(t.sin(), target), fullgraph=True, backend="aot_eager")
    expected = ops.cross_entropy(leaf.sin(), target)
    torch.testing.assert_close(compiled(leaf), expected)
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf), leaf), torch.autograd.grad(expected, leaf))


def test_double_backward() -> None:
    x, target = torch.randn(4, 9, requires_grad=True), torch.tensor([0, 8, -100, 3])
    (first,) = torch.autograd.grad(ops.cross_entropy(x, target), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    exact = x.detach().double().requires_grad_()
    (first,) = torch.autograd.grad(reference.cross_entropy(exact, target), exact, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), exact)
    torch.testing.assert_close(second.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_target_that_is_no_class_touches_no_memory(compiled: bool) -> None:
    x = torch.randn(3, 5)
    function = torch.compile(ops.cross_entropy, backend="aot_eager") if compiled else ops.cross_entropy
    for bad in (5, -1, 2**40):
        with pytest.raises(IndexError, match=rf"expected classes in \[0, 5\) .*, but got {bad} in row 1"):
            function(x, torch.tensor([0, bad, 2]))


CLASSES = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("target", "options", "error", "message"),
    [
        (CLASSES.new_zeros(4), {}, ValueError, r"target: expected shape \[3\], but got \[4\]"),
        (CLASSES.int(), {}, RuntimeError, r"target: expected dtype torch\.int64"),
        (CLASSES.to("meta"), {}, RuntimeError, r"target: expected device cpu, but got meta"),
        (CLASSES, {"reduction": "max"}, ValueError, r"reduction: expected 'mean', 'sum' or 'none'"),
        (CLASSES, {"label_smoothing": 1.5}, RuntimeError, r"label_smoothing: expected a number in"),
    ],
)
def test_bad_input_is_named(
    target: torch.Tensor, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ops.cross_entropy(torch.randn(3, 5), target, **options)


def test_deprecated_arguments_are_served() -> None:
    logits = torch.randn(3, 5)
    for values in ((None, False), (False, None), (False, True), (True, False), (True, True), (0, 1)):
        options: Any = dict(zip(("size_average", "reduce"), values, strict=True))
        with pytest.warns(UserWarning, match=r"\[cross_entropy\] size_average, reduce: deprecated in torch; use red"):
            ours = ops.cross_entropy(logits, CLASSES, **options)
        with pytest.warns(UserWarning, match="size_average and reduce"):
            torch.testing.assert_close(ours, F.cross_entropy(logits, CLASSES, **options))


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 4), (2, 3, 4, 5), (0, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32], ids=str)
def test_a_target_of_another_shape_is_refused_as_torch_does(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """By the same class of error, or served where torch serves it."""
    logits = torch.randn(shape)
    for other in ((), (1,), (2,), (3,), (2, 1), (2, 3), (2, 4), (3, 4), (2, 5), (2, 3, 4), (2, 4, 5), (2, 4, 6)):
        if (dtype.is_floating_point and len(shape) == 1) or (shape[0] == 0 and other == ()):
            continue  # torch speaks of the dtype first, and stumbles over its own error
        target = torch.zeros(other, dtype=dtype)
        found: list[object] = []
        for function in (F.cross_entropy, ops.cross_entropy):
            try:
                found.append(function(logits, target).isnan().item())
            except (ValueError, RuntimeError) as error:
                found.append(type(error))
        assert found[0] == found[1], (shape, other, found)
