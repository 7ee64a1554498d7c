"""The CUDA kernels of swiglu and geglu on the emulated GPU (tests/emulation): every number of 16 bits, rows of every
length, distance and alignment.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from by_exponent import by_exponent, hold_by_row
from gated_forms import GATED_FORMS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN = float("nan")


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("form", GATED_FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_exponent(dtype: torch.dtype, form: str) -> None:
    """Every number of 16 bits as a gate, and of float32 every exponent, beside an ordinary up."""
    gate = by_exponent(dtype)
    up = torch.randn(gate.shape).to(dtype)

    def run(function: Callable[..., Tensor], gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        leaves = gate.detach().requires_grad_(), up.detach().requires_grad_()
        y = function(*leaves)
        return y.detach(), *torch.autograd.grad(y.sum(), leaves)

    of = GATED_FORMS[form]
    found, theirs = (run(function, gate, up) for function in (of.ours, of.torchs))
    exact = run(of.definition, gate.double(), up.double())
    for name, got, its, right in zip(("y", "dgate", "dup"), found, theirs, exact, strict=True):
        hold_by_row(got, its, right, name)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("form", GATED_FORMS)
def test_infinities_and_nan_of_up_go_through(form: str) -> None:
    for dtype in DTYPES:
        up = by_exponent(dtype)
        gate = torch.full_like(up, 1.5)
        found, right = (function(gate, up) for function in GATED_FORMS[form][:2])
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found, right, rtol=2 * eps, atol=torch.finfo(dtype).tiny, equal_nan=True)


def laid_out(rows: int, cols: int, stride: int, offset: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """NaN, and a matrix in it whose rows are `stride` elements apart, from element `offset` on."""
    whole = torch.full((offset + rows * max(stride, cols) + 9,), NAN, dtype=dtype)
    return whole, whole.as_strided((rows, cols), (stride, 1), offset)


def check(
    module: ModuleType, form: str, shape: tuple[int, int], dtype: torch.dtype, strides: list[int], offsets: list[int]
) -> None:
    """Forward and backward of matrices gate, up, dgate and dup with these strides and offsets; output and doutput are
    contiguous and have the last offset. Nothing beside them is written.
    """
    rows, cols = shape
    layouts = zip([*strides, cols, cols], [*offsets[:4], offsets[-1], offsets[-1]], strict=True)
    names = "gate", "up", "dgate", "dup", "output", "doutput"
    memory = {name: laid_out(*shape, *each, dtype) for name, each in zip(names, layouts, strict=True)}
    gate, up, dgate, dup, output, doutput = (matrix for _, matrix in memory.values())
    for row in (*gate, *up, *doutput):  # rows of a stride of 0 are one
        row.copy_(2 * torch.randn(cols))
    module.gated_forward(gate=gate, up=up, activation=form, output=output)
    module.gated_backward(doutput=doutput, gate=gate, up=up, activation=form, dgate=dgate, dup=dup)
    for name in ("dgate", "dup", "output"):
        whole, matrix = memory[name]
        assert matrix.isfinite().all(), name
        assert int(whole.isnan().sum()) == whole.numel() - rows * cols, name
    wide = [t.double().requires_grad_() for t in (gate, up)]
    right = GATED_FORMS[form].definition(*wide)
    exact = right.detach(), *torch.autograd.grad(right, wide, doutput.double())
    rtol, atol = torch.finfo(dtype).eps + 5e-7, 1e-6 if dtype is torch.float32 else 1e-5
    for found, expected in zip((output, dgate, dup), exact, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("form", GATED_FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_row_of_every_tail(emulated: ModuleType, dtype: torch.dtype, form: str) -> None:
    vector = 16 // dtype.itemsize
    tile = 512 * vector
    for numel in (1, vector - 1, vector, vector + 1, 33 * vector - 1, 256 * vector + 1, tile - 1, tile, 2 * tile + 3):
        for offset in (0, 1):
            check(emulated, form, (1, numel), dtype, [numel] * 4, [offset] * 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [1, 5, 8, 24, 64, 100, 520, 4096, 4168, 9000])
def test_rows(emulated: ModuleType, cols: int, dtype: torch.dtype) -> None:
    """Rows beside each other; halves of a packed tensor; rows at distances and addresses that no two tensors share."""
    rows = 3 if cols > 1000 else 37
    for strides, offsets in (
        ([cols] * 4, [0] * 5),
        ([2 * cols] * 4, [0, cols, 0, cols, 0]),
        ([cols + 8, 2 * cols + 16, cols + 24, cols + 8], [8, 0, 16, 8, 0]),
        ([cols + 1, cols, cols + 3, cols + 2], [1, 2, 3, 0, 1]),
        ([cols + 8] * 4, [0, 0, 0, 1, 0]),
        ([0, cols, cols, cols], [0] * 5),  # gate is one row for all
    ):
        check(emulated, "silu", (rows, cols), dtype, strides, offsets)


def test_more_rows_than_a_grid_has_groups(emulated: ModuleType) -> None:
    """A block goes on to another group of rows: a grid has 4096 groups, of 256 rows here."""
    rows = 4096 * 256 + 300
    gate, up = (torch.full((rows, 2), NAN)[:, :1] for _ in range(2))
    ends = slice(300), slice(-600, None)
    for part in ends:
        gate[part], up[part] = torch.randn_like(gate[part]), torch.randn_like(up[part])
    output = torch.zeros(rows, 1)
    emulated.gated_forward(gate=gate, up=up, activation="silu", output=output)
    for part in ends:
        torch.testing.assert_close(output[part], functional.silu(gate[part]) * up[part])
    assert output[300:-600].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_beyond_two_billion_elements(emulated: ModuleType, dtype: torch.dtype) -> None:
    """Only the pages that are written exist."""
    stride = 2**30 + 8
    whole = torch.empty(2 * stride + 64, dtype=dtype)
    gate, dgate = (whole.as_strided((3, 24), (stride, 1), at) for at in (0, 32))
    up, output, dup, doutput = (torch.randn(3, 24).to(dtype) for _ in range(4))
    gate.copy_(torch.randn(3, 24))
    emulated.gated_forward(gate=gate, up=up, activation="silu", output=output)
    emulated.gated_backward(doutput=doutput, gate=gate, up=up, activation="silu", dgate=dgate, dup=dup)
    leaves = [t.float().requires_grad_() for t in (gate, up)]
    right = functional.silu(leaves[0]) * leaves[1]
    grads = torch.autograd.grad(right, leaves, doutput.float())
    for found, expected in zip((output, dgate, dup), (right.detach(), *grads), strict=True):
        torch.testing.assert_close(found, expected.to(dtype))


@pytest.mark.parametrize("form", GATED_FORMS)
def test_an_element_has_the_same_bits_wherever_it_lies(emulated: ModuleType, form: str) -> None:
    for dtype in DTYPES:
        gate, up, dy = (torch.randn(5, 203).to(dtype) for _ in range(3))
        results = []
        for cut in (1, 2):  # one tensor of 16-byte vectors; rows of single elements
            operands = [torch.cat((t, t), 1)[:, :203] if cut == 2 else t for t in (gate, up)]
            y, dgate, dup = (torch.full((5, 203), NAN, dtype=dtype) for _ in range(3))
            emulated.gated_forward(*operands, form, y)
            emulated.gated_backward(dy, *operands, form, dgate, dup)
            results.append(torch.cat((y, dgate, dup)))
        assert torch.equal(*results)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("form", GATED_FORMS)
def test_zeros_keep_their_sign(form: str) -> None:
    for dtype in DTYPES:
        y = GATED_FORMS[form].ours(torch.tensor([0.0, -0.0, -1e4], dtype=dtype), torch.ones(3, dtype=dtype))
        assert y.signbit().tolist() == [False, True, True]
