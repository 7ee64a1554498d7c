"""gelu: exact by the one rule, the same bits always, and an op like any other to torch."""

from __future__ import annotations

import pytest
import torch

from torchweld import _cpu, ops, reference
from torchweld.testing import Case, Oracle, cases

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases("gelu"), ids=lambda c: c.name)
def test_parity(case: Case, dtype: torch.dtype) -> None:
    """Output and gradient, on every instruction set of this CPU."""
    oracle, before = Oracle(case, dtype), _cpu.isa()
    try:
        for isa in _cpu.available_isas():
            _cpu.use_isa(isa)
            oracle.check()
    finally:
        _cpu.use_isa(before)


def test_bits_do_not_depend_on_threads(threads: None) -> None:
    x, dy = torch.randn(7, 10007, requires_grad=True), torch.randn(7, 10007)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        y = ops.gelu(x, "tanh")
        results.append((y.detach(), *torch.autograd.grad(y, x, dy)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nan_passes() -> None:
    x = torch.tensor([1.0, float("nan"), -1.0], requires_grad=True)
    y = ops.gelu(x, "tanh")
    y.sum().backward()
    assert y.isnan().tolist() == x.grad.isnan().tolist() == [False, True, False]


def test_the_exact_function_is_torchs() -> None:
    x = torch.randn(50)
    assert torch.equal(ops.gelu(x), torch.nn.functional.gelu(x))
    torch.testing.assert_close(reference.gelu(x), torch.nn.functional.gelu(x))


def test_an_op_like_any_other() -> None:
    x, dy = torch.randn(4, 33), torch.randn(4, 33)
    torch.library.opcheck(torch.ops.torchweld.gelu_forward.default, (x,))
    torch.library.opcheck(torch.ops.torchweld.gelu_backward.default, (dy, x.mT.contiguous().mT))
    wide = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: ops.gelu(t, "tanh"), wide)
    leaf = torch.randn(4, 33, requires_grad=True)
    compiled = torch.compile(lambda t: ops.gelu(t.sin(), "tanh").cos(), fullgraph=True, backend="aot_eager")
    expected = ops.gelu(leaf.sin(), "tanh").cos()
    torch.testing.assert_close(compiled(leaf), expected)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(leaf).sum(), leaf), torch.autograd.grad(expected.sum(), leaf)
    )


def test_double_backward() -> None:
    x = torch.randn(40, requires_grad=True)
    (first,) = torch.autograd.grad(ops.gelu(x, "tanh").square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    exact = x.detach().double().requires_grad_()
    (first,) = torch.autograd.grad(reference.gelu(exact, "tanh").square().sum(), exact, create_graph=True)
    (expected,) = torch.autograd.grad(first.sum(), exact)
    torch.testing.assert_close(second.double(), expected, rtol=1e-5, atol=1e-5)


def test_bad_input_is_named() -> None:
    with pytest.raises(RuntimeError, match="approximate: expected 'none' or 'tanh', but got 'erf'"):
        ops.gelu(torch.ones(3), "erf")
    with pytest.raises(TypeError, match=r"input: expected a floating-point dtype, but got torch\.int64"):
        ops.gelu(torch.ones(3, dtype=torch.int64), "tanh")
    with pytest.raises(ValueError, match="output: expected 3 elements, but got shape"):
        _cpu.gelu_forward(torch.ones(3), torch.ones(4))
