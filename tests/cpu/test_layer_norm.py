"""layer_norm, rms_norm, with a residual or without: exact by the one rule, the same bits always, and ops to torch."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from leaves import gradient
from thread_counts import hold_bits
from torchweld import _cpu, nn, ops, reference
from torchweld.ops._norm import Norm
from torchweld.testing import Case, Oracle, cases

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm")
CASES = [case for name in NAMES for case in cases(name)]


def ident(value: object) -> str:
    return f"{value.op}: {value.name}" if isinstance(value, Case) else str(value).removeprefix("torch.")


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("case", CASES, ids=ident)
def test_parity(case: Case, dtype: torch.dtype, each_isa: Iterator[str]) -> None:
    """Every output and every gradient, on every instruction set of this CPU."""
    oracle = Oracle(case, dtype)
    for _ in each_isa:
        oracle.check()


@pytest.mark.parametrize("name", ["add_layer_norm", "add_rms_norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
def test_bits_do_not_depend_on_threads_or_repeats(dtype: torch.dtype, name: str) -> None:
    x, residual, dy = (torch.randn(4099, 384, dtype=dtype) for _ in range(3))
    parameters = [torch.randn(384, dtype=dtype) for _ in range(1 if "rms" in name else 2)]

    def run() -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, residual, *parameters)]
        normed, total = getattr(ops, name)(leaves[0], leaves[1], (384,), *leaves[2:])
        return [normed, total, *torch.autograd.grad([normed, total], leaves, [dy, dy])]

    hold_bits(run)


def test_rows_far_apart_in_memory() -> None:
    """An offset beyond 2^31 elements; only the touched pages exist."""
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    x = memory.as_strided((2, 32), (2**31 + 8, 1)).copy_(torch.randn(2, 32))
    torch.testing.assert_close(ops.layer_norm(x, (32,)), torch.nn.functional.layer_norm(x.clone(), (32,)))


@pytest.mark.slow
def test_registered_ops_pass_opcheck() -> None:
    x, r, w, b = torch.randn(5, 4, 33), torch.randn(5, 4, 33), torch.randn(33), torch.randn(33)
    library = torch.ops.torchweld
    plain, rms, gemma = Norm(33, 1e-5), Norm(33, 1e-5, centred=False), Norm(33, 1e-5, centred=False, weight_offset=1.0)
    dropout, seed = Norm(33, 1e-5, dropout_p=0.5), torch.tensor([7])
    torch.library.opcheck(library.layer_norm.default, (x, w, b, *plain))
    torch.library.opcheck(library.layer_norm.default, (x.mT.contiguous().mT, None, None, *plain))
    torch.library.opcheck(library.layer_norm.default, (x, w, None, *gemma))
    torch.library.opcheck(library.layer_norm_forward.default, (x.bfloat16(), w, b, *plain))
    torch.library.opcheck(library.layer_norm_forward.default, (x, w, None, *rms))
    torch.library.opcheck(library.add_layer_norm_forward.default, (x, r, w, None, None, *plain))
    torch.library.opcheck(library.add_layer_norm_forward.default, (x, r, w, None, None, *gemma))
    torch.library.opcheck(library.add_layer_norm_forward.default, (x.bfloat16(), r, w, b, seed, *dropout))
    _, total, stats = library.add_layer_norm_forward(x, r, w, None, None, *gemma)
    backward = library.layer_norm_backward.default
    torch.library.opcheck(backward, (r, x, total, w, None, stats, None, [True, False, True, False], *gemma))
    _, total, stats = library.add_layer_norm_forward(x, r, w, b, None, *plain)
    for mask in ([True, False, True, True], [True, False, False, False], [False, False, False, True]):
        torch.library.opcheck(backward, (r, x, total, w, b, stats, None, mask, *plain))
    torch.library.opcheck(backward, (r.bfloat16(), x, r, w, None, stats, seed, [True, True, True, False], *dropout))


@pytest.mark.slow
def test_gradcheck() -> None:
    x, r = (torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w, b = (torch.randn(2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *t: ops.layer_norm(t[0], (2, 5), *t[1:]), (x, w, b))
    assert torch.autograd.gradcheck(lambda *t: ops.add_layer_norm(t[0], t[1], (2, 5), *t[2:]), (x, r, w, b))
    assert torch.autograd.gradgradcheck(lambda *t: ops.layer_norm(t[0], (2, 5), *t[1:]), (x, w, b))
    assert torch.autograd.gradcheck(lambda *t: ops.rms_norm(t[0], (2, 5), t[1], zero_centered_weight=True), (x, w))
    dropout: dict[str, Any] = {"dropout_p": 0.4, "seed": torch.tensor([1])}
    assert torch.autograd.gradcheck(lambda *t: ops.add_rms_norm(t[0], t[1], (2, 5), t[2], **dropout), (x, r, w))
    assert torch.autograd.gradgradcheck(lambda *t: ops.rms_norm(t[0], (2, 5), t[1]), (x, w))


def second_gradients(module: ModuleType, name: str, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, r, w, b = (torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in ((6, 40), (6, 40), 40, 40))
    inputs, parameters = [x, r] if "add" in name else [x], [w] if "rms" in name else [w, b]
    leaves, outputs = inputs + parameters, getattr(module, name)(*inputs, (40,), *parameters)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum((o.square() * torch.linspace(0, 1, 40, dtype=dtype)).sum() for o in outputs)
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    return list(torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), leaves))


@pytest.mark.parametrize("name", NAMES)
def test_double_backward(name: str) -> None:
    """Kernel forward, then gradients of gradients: those of the definition."""
    got = second_gradients(ops, name, torch.float32)
    exact = second_gradients(reference, name, torch.float64)
    for g, e in zip(got, exact, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=0, atol=2e-5 * float(e.abs().max()))


def test_only_what_is_asked_for_is_differentiated() -> None:
    x, w, b = torch.randn(40, 24), torch.randn(24, requires_grad=True), torch.randn(24)
    ops.layer_norm(x, (24,), w, b).sum().backward()
    xhat = reference.layer_norm(x, (24,))
    torch.testing.assert_close(w.grad, xhat.sum(0), rtol=1e-4, atol=1e-4)
    assert x.grad is None and b.grad is None
    # The sum alone: its gradient passes through, and the norm's parameters get none.
    r = torch.randn(40, 24, requires_grad=True)
    w.grad = None
    ops.add_layer_norm(x, r, (24,), w, b)[1].backward(torch.full((40, 24), 3.0))
    assert torch.equal(gradient(r), torch.full((40, 24), 3.0))
    assert w.grad is None


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_a_break(name: str) -> None:
    function, fused = getattr(ops, name), name.startswith("add")

    def step(x: torch.Tensor, r: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        if not fused:
            return function(x.sin(), (24,), *parameters).cos()
        normed, total = function(x.sin(), r, (24,), *parameters)
        return normed.cos() + total

    shapes = ((7, 24), (7, 24), (24,), (24,))[: 3 if "rms" in name else 4]
    leaves = [torch.randn(s, requires_grad=True) for s in shapes]
    used = leaves if fused else [leaves[0], *leaves[2:]]
    expected = step(*leaves)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(got, expected)
    for g, e in zip(torch.autograd.grad(got.sum(), used), torch.autograd.grad(expected.sum(), used), strict=True):
        torch.testing.assert_close(g, e)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves), expected)


def test_function_transforms_see_the_definition() -> None:
    x, w = torch.randn(4, 3, 16), torch.randn(16)
    batched = vmap(lambda t: ops.layer_norm(t, (16,), w))(x)
    torch.testing.assert_close(batched, ops.layer_norm(x, (16,), w))
    module = nn.LayerNorm(16)
    parameters = dict(module.named_parameters())
    got = grad(lambda p: functional_call(module, p, (x,)).square().sum())(parameters)
    module(x).square().sum().backward()
    for name, p in parameters.items():
        torch.testing.assert_close(got[name], p.grad)


@pytest.mark.usefixtures("isa")
class TestOddRows:
    @pytest.mark.parametrize("cols", [3, 777, 9001])
    @pytest.mark.parametrize("value", [0.1, 1e6, -3.3e9, 1e30, 3e38])
    def test_equal_numbers_are_their_mean(self, value: float, cols: int) -> None:
        """However the mean is rounded on its way: zeros, and without an eps NaN, as 0 / 0 is in torch."""
        x = torch.full((2, cols), value)
        assert not ops.layer_norm(x, (cols,)).any()
        if value < 1e30:
            assert ops.layer_norm(x, (cols,), eps=0.0).isnan().all()

    @pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
    @pytest.mark.parametrize("scale", [1e20, 1e30, 1e35])
    def test_squares_beyond_float32(self, scale: float, name: str) -> None:
        """Zeros, as torch's where those are not NaN; the gradients are finite."""
        x = (torch.randn(3, 300, generator=torch.Generator().manual_seed(0)).clamp(-1.5, 1.5) * scale).requires_grad_()
        y = getattr(ops, name)(x, (300,))
        assert not y.any()
        assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()

    def test_rms_norm_keeps_the_sign_of_zeros(self) -> None:
        x = torch.tensor([[0.0, -0.0, 1.0, -1e-45]])
        expected = torch.nn.functional.rms_norm(x, (4,))
        assert torch.equal(ops.rms_norm(x, (4,)).signbit(), expected.signbit())

    @pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
    @pytest.mark.parametrize("odd", [torch.inf, -torch.inf, torch.nan])
    def test_what_is_not_finite(self, odd: float, name: str) -> None:
        x = torch.randn(3, 100)
        x[1, 7] = odd
        found, expected = (getattr(m, name)(x, (100,)) for m in (ops, torch.nn.functional))
        assert torch.equal(found.isnan(), expected.isnan())


X = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, (5,)), RuntimeError, r"\[layer_norm\] input: expected a shape that ends in .*\[5\], but got"),
        ((X, ()), RuntimeError, r"\[layer_norm\] normalized_shape: expected at least one dimension, but got \(\)"),
        ((X, (4,), torch.ones(3)), RuntimeError, r"weight: expected shape \[4\], but got \[3\]"),
        ((X, (4,), None, X[:1]), RuntimeError, r"bias: expected shape \[4\], but got \[1, 4\]"),
        ((X.int(), (4,)), TypeError, r"input: expected a floating-point dtype, but got torch\.int32"),
    ],
)
def test_bad_input_is_named(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.layer_norm(*arguments)


def test_bad_input_of_rms_norm_is_named() -> None:
    for arguments, error, message in (
        ((X, (5,)), RuntimeError, r"\[rms_norm\] input: expected a shape that ends in .*\[5\], but got"),
        ((X, (4,), torch.ones(3)), RuntimeError, r"\[rms_norm\] weight: expected shape \[4\], but got \[3\]"),
        ((X.int(), (4,)), TypeError, r"\[rms_norm\] input: expected a floating-point dtype, but got torch\.int32"),
    ):
        with pytest.raises(error, match=message):
            ops.rms_norm(*arguments)
    with pytest.raises(RuntimeError, match=r"\[add_rms_norm\] residual: expected x's shape"):
        ops.add_rms_norm(X, X[:1], (4,))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=ident)
def test_rms_norms_own_eps_is_torchs(dtype: torch.dtype) -> None:
    """Where the mean square is of the size of eps, so that another eps would show."""
    x = torch.full((2, 8), 1e-4, dtype=dtype)
    expected = torch.nn.functional.rms_norm(x, (8,))
    torch.testing.assert_close(ops.rms_norm(x, (8,)), expected)
    torch.testing.assert_close(ops.add_rms_norm(x / 2, x / 2, (8,))[0], expected)


def test_bad_residual_is_named() -> None:
    x = torch.ones(3, 4)
    for residual, error, message in (
        (x.new_ones(3, 5), RuntimeError, r"residual: expected x's shape \[3, 4\]"),
        (x.int(), TypeError, r"residual: expected a floating-point dtype, but got torch\.int32"),
        (x.to("meta"), RuntimeError, "residual: expected x's device cpu, but got meta"),
    ):
        with pytest.raises(error, match=message):
            ops.add_layer_norm(x, residual, (4,))
    with pytest.raises(ValueError, match=r"dropout_p: expected a probability from 0 to 1, but got 1\.5"):
        ops.add_rms_norm(x, x, (4,), dropout_p=1.5)
    with pytest.raises(RuntimeError, match=r"seed: expected one int64 element on cpu, but got torch\.float32 of shape"):
        ops.add_rms_norm(x, x, (4,), dropout_p=0.5, seed=torch.ones(1))


def test_the_kernels_check_again() -> None:
    """What reaches the module past the public function is still refused before memory is touched."""
    x, out = torch.ones(3, 4), torch.empty(3, 4)
    calls: list[tuple[Tensor, Tensor | None, int, Tensor, str]] = [
        (x, None, 4, torch.empty(2, 4), "output: expected 12 elements, but got shape"),
        (x, torch.ones(4).half(), 4, out, "weight: expected dtype float32 or float32"),
        (x, torch.ones(8)[::2], 4, out, "weight: expected a contiguous tensor"),
        (x, None, 5, out, "input: expected 10 elements"),
        (x, None, 0, out, "cols: expected at least 1"),
        (x.double(), None, 4, out, "input: expected dtype float32, bfloat16 or float16"),
    ]
    for input, weight, cols, output, message in calls:
        with pytest.raises(ValueError, match=message):
            _cpu.layer_norm_forward(input, None, weight, None, None, Norm(cols, 1e-5), None, output, None, None)
