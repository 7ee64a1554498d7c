"""gelu: exact by the one rule, the same bits always, and an op like any other to torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from by_exponent import hold_gelu
from thread_counts import hold_bits
from torchweld import _cpu, ops, reference
from torchweld.testing import Case, Oracle, cases

# Layouts of memory: of images with channels behind, of heads, transposed, with gaps, of one row for all.
LAYOUTS = {
    "channels_last": torch.randn(2, 6, 4, 5).to(memory_format=torch.channels_last),
    "channels_last_3d": torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
    "heads": torch.randn(2, 5, 3, 8).transpose(1, 2),
    "transposed": torch.randn(7, 9).t(),
    "gaps": torch.randn(10, 12)[::2, ::3].t(),
    "expanded": torch.randn(1, 9).expand(4, 9),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases("gelu"), ids=lambda c: c.name)
def test_parity(case: Case, dtype: torch.dtype, each_isa: Iterator[str]) -> None:
    """Output and gradient, on every instruction set of this CPU."""
    oracle = Oracle(case, dtype)
    for _ in each_isa:
        oracle.check()


def test_bits_do_not_depend_on_threads() -> None:
    x, dy = torch.randn(7, 10007, requires_grad=True), torch.randn(7, 10007)

    def run() -> tuple[torch.Tensor, ...]:
        y = ops.gelu(x, "tanh")
        return y.detach(), *torch.autograd.grad(y, x, dy)

    hold_bits(run)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_exponent(dtype: torch.dtype, approximate: str, each_isa: Iterator[str]) -> None:
    hold_gelu(dtype, approximate, each_isa)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_zeros_keep_their_sign(approximate: str) -> None:
    assert ops.gelu(torch.tensor([0.0, -0.0, -1e30]), approximate).signbit().tolist() == [False, True, True]


def test_the_definition_does_not_cancel_far_below_zero() -> None:
    x = torch.tensor([-7.0, -20.0], dtype=torch.float64)
    exact = [-8.958687807e-12, -5.507248237e-88]  # both computed with 40 digits
    assert reference.gelu(x).tolist() == pytest.approx(exact, rel=1e-9, abs=0)
    assert reference.gelu(x[:1], "tanh").tolist() == pytest.approx([-2.315442262e-15], rel=1e-9, abs=0)


@pytest.mark.slow
def test_an_op_like_any_other() -> None:
    x, dy = torch.randn(4, 33), torch.randn(4, 33)
    torch.library.opcheck(torch.ops.torchweld.gelu_forward.default, (x,))
    torch.library.opcheck(torch.ops.torchweld.gelu_forward.default, (x, True))
    torch.library.opcheck(torch.ops.torchweld.gelu_backward.default, (dy, x.mT.contiguous().mT))
    torch.library.opcheck(torch.ops.torchweld.gelu_backward.default, (dy, x, True))
    wide = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    for approximate in ("tanh", "none"):
        assert torch.autograd.gradcheck(lambda t, form=approximate: ops.gelu(t, form), wide)
    leaf = torch.randn(4, 33, requires_grad=True)
    compiled = torch.compile(lambda t: ops.gelu(t.sin(), "tanh").cos(), fullgraph=True, backend="aot_eager")
    expected = ops.gelu(leaf.sin(), "tanh").cos()
    torch.testing.assert_close(compiled(leaf), expected)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(leaf).sum(), leaf), torch.autograd.grad(expected.sum(), leaf)
    )


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_double_backward(approximate: str) -> None:
    x = torch.randn(40, requires_grad=True)
    (first,) = torch.autograd.grad(ops.gelu(x, approximate).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    exact = x.detach().double().requires_grad_()
    (first,) = torch.autograd.grad(reference.gelu(exact, approximate).square().sum(), exact, create_graph=True)
    (expected,) = torch.autograd.grad(first.sum(), exact)
    torch.testing.assert_close(second.double(), expected, rtol=1e-5, atol=1e-5)


def test_bad_input_is_named() -> None:
    with pytest.raises(RuntimeError, match="approximate: expected 'none' or 'tanh', but got 'erf'"):
        ops.gelu(torch.ones(3), "erf")
    with pytest.raises(TypeError, match=r"input: expected a floating-point dtype, but got torch\.int64"):
        ops.gelu(torch.ones(3, dtype=torch.int64), "tanh")
    with pytest.raises(ValueError, match="output: expected 3 elements, but got shape"):
        _cpu.gelu_forward(torch.ones(3), False, torch.ones(4))


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_is_that_of_torch(name: str) -> None:
    """What follows may ask for a view that this layout has."""
    for approximate in ("none", "tanh"):
        found = []
        for function in (F.gelu, ops.gelu):
            x = LAYOUTS[name].detach().requires_grad_()
            y = function(x, approximate=approximate)
            for dy in (torch.ones(()).expand(y.shape), y.detach(), y.detach().contiguous()):
                found.append((y.stride(), y.detach(), *torch.autograd.grad(y, x, dy, retain_graph=True)))
        for right, ours in zip(found[:3], found[3:], strict=True):
            assert ours[0] == right[0]
            torch.testing.assert_close(ours[1:], right[1:])
    compiled = torch.compile(lambda x: ops.gelu(x) + 1, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(LAYOUTS[name]), ops.gelu(LAYOUTS[name]) + 1)
