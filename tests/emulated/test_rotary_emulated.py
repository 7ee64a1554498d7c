"""The CUDA kernels of rotary_embedding on the emulated GPU (tests/emulation): heads of every size, distance and
alignment, tables of each kind, few and many heads, in place.
"""

from __future__ import annotations

from itertools import product
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from torchweld import ops, reference
from torchweld.ops._rotary import Rotation, Tables
from torchweld.reference.rotary_embedding import rotary_tables

NAN = float("nan")
# Of the tensors, and of the tables.
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
]


class Shape(NamedTuple):
    batch: int
    heads: int
    kv_heads: int
    tokens: int
    dim: int
    rotary_dim: int


class Memory(NamedTuple):
    """(B, H, N, D) in memory that is NaN beside it."""

    whole: Tensor
    heads: Tensor

    def is_untouched_beside(self) -> bool:
        return int(self.whole.isnan().sum()) == self.whole.numel() - self.heads.numel()


def memory(shape: Shape, heads: int, dtype: torch.dtype, *, tokens_first: bool, gap: int, offset: int) -> Memory:
    """Heads `gap` elements apart, from element `offset` on."""
    width = shape.dim + gap
    whole = torch.full((shape.batch * heads * shape.tokens * width + offset,), NAN, dtype=dtype)
    if tokens_first:
        laid_out = whole[offset:].view(shape.batch, shape.tokens, heads, width).transpose(1, 2)
    else:
        laid_out = whole[offset:].view(shape.batch, heads, shape.tokens, width)
    return Memory(whole, laid_out[..., : shape.dim])


def tables(shape: Shape, rows: int, columns: str, *, batched: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A column for a "pair", for an "element", or for elements whose angles have nothing in common."""
    count = shape.rotary_dim // (2 if columns == "pair" else 1)
    angles = torch.randn(*((shape.batch,) if batched else ()), rows, count)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def check(
    module: ModuleType,
    shape: Shape,
    dtypes: tuple[torch.dtype, torch.dtype],
    *,
    columns: str = "element",
    interleaved: bool = False,
    positions: int = 0,
    batched: bool = False,
    tokens_first: bool = False,
    gap: int = 0,
    offset: int = 0,
    inplace: bool = False,
) -> None:
    """Both directions against the definition in float64; every element is written, and nothing beside them."""
    dtype, table = dtypes
    layout: dict[str, Any] = {"tokens_first": tokens_first, "gap": gap, "offset": offset}
    cos, sin = tables(shape, positions or shape.tokens, columns, batched=batched and not positions, dtype=table)
    ids = None
    if positions:
        ids = torch.randint(positions, (shape.batch, shape.tokens) if batched else (shape.tokens,))
    for inverse in (False, True):
        counts = [n for n in (shape.heads, shape.kv_heads) if n]
        inputs = [memory(shape, n, dtype, **layout) for n in counts]
        for each in inputs:
            each.heads.copy_(torch.randn(each.heads.shape))
        wide = [each.heads.double() for each in inputs]
        outputs = inputs if inplace else [memory(shape, n, dtype, **layout) for n in counts]
        module.rotary_embedding(
            query=inputs[0].heads,
            key=inputs[1].heads if shape.kv_heads else None,
            tables=Tables(cos, sin, ids),
            rotation=Rotation(shape.rotary_dim, interleaved, inverse),
            query_output=outputs[0].heads,
            key_output=outputs[1].heads if shape.kv_heads else None,
        )
        leaves = [t.clone().requires_grad_() for t in wide]
        right: Any = reference.rotary_embedding(
            leaves[0],
            leaves[1] if shape.kv_heads else None,
            cos.double(),
            sin.double(),
            position_ids=ids,
            interleaved=interleaved,
            rotary_dim=shape.rotary_dim,
        )
        right = right if shape.kv_heads else (right,)
        if inverse:  # the inverse is the transpose
            right = torch.autograd.grad(right, leaves, wide)
        eps = torch.finfo(dtype).eps
        for found, expected in zip(outputs, right, strict=True):
            assert found.is_untouched_beside()
            torch.testing.assert_close(found.heads.double(), expected.detach(), rtol=eps, atol=1e-6)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_heads_of_every_size(emulated: ModuleType, interleaved: bool, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Whole vectors; a half, or what is copied, that is none; more vectors than a block has threads."""
    for dim, rotary_dim in (
        *((2, 2), (8, 8), (16, 16), (64, 64), (128, 128), (40, 40), (3, 2), (7, 6)),
        *((80, 32), (96, 64), (50, 36), (64, 20), (24, 16), (2048, 2048), (4200, 2064)),
    ):
        check(emulated, Shape(2, 3, 1, 5, dim, rotary_dim), dtypes, interleaved=interleaved)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_layouts(
    emulated: ModuleType, interleaved: bool, inplace: bool, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """Tokens first or heads first, heads beside others or not, at addresses that vectors have or have not."""
    for tokens_first, gap, offset in product((False, True), (0, 1, 16), (0, 1, 8)):
        check(
            emulated,
            Shape(2, 5, 2, 7, 32, 16),
            dtypes,
            interleaved=interleaved,
            inplace=inplace,
            tokens_first=tokens_first,
            gap=gap,
            offset=offset,
        )


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(("positions", "batched"), [(0, False), (0, True), (50, False), (50, True)])
@pytest.mark.parametrize(("columns", "interleaved"), [("pair", False), ("element", False), ("element", True)])
def test_tables(
    emulated: ModuleType,
    columns: str,
    interleaved: bool,
    positions: int,
    batched: bool,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> None:
    for dim in (32, 12):
        check(
            emulated,
            Shape(3, 2, 1, 9, dim, dim),
            dtypes,
            columns=columns,
            interleaved=interleaved,
            positions=positions,
            batched=batched,
        )


@pytest.mark.parametrize("shape", [(1, 1, 0), (1, 4, 4), (1, 5, 0), (2, 33, 3), (1, 71, 8), (1, 8, 64)], ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 700])
@pytest.mark.parametrize("dtypes", DTYPES[:2], ids=str)
def test_few_and_many_heads(
    emulated: ModuleType, dtypes: tuple[torch.dtype, torch.dtype], tokens: int, shape: tuple[int, int, int]
) -> None:
    """A thread has 4 heads of few tokens; of more tokens it has more, and at last all."""
    for multiprocessors in (1, 132):
        emulated.set_machine(multiprocessors=multiprocessors)
        check(emulated, Shape(*shape, tokens, 64, 64), dtypes, tokens_first=tokens == 700)


def test_heads_that_are_one_in_memory(emulated: ModuleType) -> None:
    """An input may be expanded: its strides are 0."""
    query = torch.randn(2, 1, 7, 32).expand(2, 6, 7, 32)
    cos, sin = rotary_tables(torch.arange(7), 32)
    output = torch.full((2, 6, 7, 32), NAN)
    emulated.rotary_embedding(query, None, Tables(cos, sin, None), Rotation(32, interleaved=False), output, None)
    torch.testing.assert_close(output, reference.rotary_embedding(query, None, cos, sin))


def test_heads_beyond_two_billion_elements(emulated: ModuleType) -> None:
    """Only the pages that are written exist."""
    stride = 2**30 + 8
    whole = torch.empty(2 * stride + 64, dtype=torch.bfloat16)
    cos, sin = rotary_tables(torch.arange(3), 32)
    for strides in ((stride, 32, 32), (32, stride, 32), (32, 32, stride)):
        size = tuple(3 if s == stride else 1 for s in strides)
        positions = torch.arange(size[2])
        query = whole.as_strided((*size, 32), (*strides, 1))
        query.copy_(torch.randn(*size, 32))
        right = reference.rotary_embedding(query.float(), None, cos, sin, position_ids=positions)
        ops.rotary_embedding(query, None, cos, sin, position_ids=positions, inplace=True)
        torch.testing.assert_close(query.float(), right, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("bad", [-1, 7, 2**40])
def test_a_position_that_no_row_has_ends_the_kernel(emulated: ModuleType, bad: int, inplace: bool) -> None:
    """The CPU's check would wait for the GPU here. No memory is read at such a position, and no such token turned."""
    cos, sin = rotary_tables(torch.arange(7), 16)
    query = torch.randn(1, 2, 3, 16)
    output = query.clone() if inplace else torch.full_like(query, NAN)
    before = output.clone()
    ids = torch.tensor([2, bad, 0])
    with pytest.raises(RuntimeError, match="rotary_embedding: expected 0 <= position && position < rows of cos"):
        emulated.rotary_embedding(query, None, Tables(cos, sin, ids), Rotation(16, interleaved=False), output, None)
    torch.testing.assert_close(output[:, :, 1], before[:, :, 1], equal_nan=True)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("interleaved", [False, True])
def test_what_is_turned_back_is_what_was(interleaved: bool) -> None:
    query = torch.randn(2, 3, 11, 64, requires_grad=True)
    turned = ops.rotary_embedding(query, position_ids=torch.arange(5000, 5011), interleaved=interleaved)
    (back,) = torch.autograd.grad(turned, query, turned.detach())
    torch.testing.assert_close(back, query.detach())
