"""The matrix products of csrc/cpu/matmul on their own: pack and product, in every format of every instruction set."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from compiled import compiled, isas, memory

SOURCE = Path(__file__).parent / "programs" / "products.cpp"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = [f"{kind}{str(dtype).removeprefix('torch.')}" for kind in ("", "vector_") for dtype in DTYPES]
# Rows, columns, summed elements: one, a vector or a block and its neighbours, several blocks, an odd end.
SIZES = [(1, 1, 1), (5, 15, 2), (6, 16, 31), (7, 17, 32), (16, 33, 33), (33, 64, 64), (40, 70, 100), (97, 31, 300)]
STORE, ACCUMULATE, ACCUMULATE_TRANSPOSED = range(3)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")]


@pytest.fixture(scope="module", params=isas())
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled(SOURCE, request.param, tmp_path_factory.mktemp("products"))


class Units(NamedTuple):
    """What spans of a format are multiples of."""

    block_rows: int
    columns: int
    elements: int
    parts: int
    lanes: int


def units(library: ctypes.CDLL, name: str) -> Units:
    found = (ctypes.c_long * 5)()
    getattr(library, f"{name}_units")(found)
    return Units(*found)


def up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def product(
    library: ctypes.CDLL, name: str, kind: int, a: Tensor, b: Tensor, sizes: tuple[int, ...], c: Tensor
) -> None:
    getattr(library, name)(
        kind, memory(a), memory(b), (ctypes.c_long * 4)(*sizes), memory(c), ctypes.c_long(c.shape[1])
    )


def operands(name: str, shape: tuple[int, int], seed: int, integers: bool) -> Tensor:
    dtype = getattr(torch, name.removeprefix("vector_"))
    generator = torch.Generator().manual_seed(seed)
    if integers:  # small ones: every sum of their products is exact
        return torch.randint(-8, 9, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def check(found: Tensor, a: Tensor, b: Tensor, start: Tensor | float, integers: bool) -> None:
    """`found` is a @ b, added to `start`: exactly, or to float32."""
    expected = a.double() @ b.double() + start
    if integers:
        assert torch.equal(found.double(), expected)
    else:
        room = 2.0**-21 * (a.double().abs() @ b.double().abs() + 1)
        assert ((found.double() - expected).abs() <= room).all()


@pytest.mark.parametrize("integers", [True, False], ids=["integers", "normal"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_a_product_is_stored(library: ctypes.CDLL, name: str, sizes: tuple[int, int, int], integers: bool) -> None:
    rows, columns, dim = sizes
    unit = units(library, name)
    a, b = operands(name, (rows, dim), 0, integers), operands(name, (columns, dim), 1, integers)
    c = torch.full((up(rows, 96), up(columns, 64) + 64), torch.nan)
    first = columns // 2
    product(library, name, STORE, a, b, (*sizes, first), c)
    for begin in range(0, rows, unit.block_rows):
        end = min(begin + unit.block_rows, rows)
        low = first // unit.columns * unit.columns if begin // unit.block_rows % 2 else 0
        check(c[begin:end, low:columns], a[begin:end], b[low:].T, 0.0, integers)
        assert not c[begin:end, columns : up(columns, unit.columns)].any()  # zeros, not what lies past the operand
        assert c[begin:end, :low].isnan().all() and c[begin:end, up(columns, unit.columns) :].isnan().all()


@pytest.mark.parametrize("integers", [True, False], ids=["integers", "normal"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", [ACCUMULATE, ACCUMULATE_TRANSPOSED], ids=["rows", "columns"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_product_is_added(
    library: ctypes.CDLL, name: str, kind: int, sizes: tuple[int, int, int], integers: bool
) -> None:
    """The left operand lies by rows, or by columns: it is never transposed in memory."""
    rows, columns, dim = sizes
    unit = units(library, name)
    a, b = operands(name, (rows, dim), 0, integers), operands(name, (dim, columns), 1, integers)
    width = up(columns, unit.lanes)
    c = torch.full((up(rows, 96), width + 64), torch.nan)
    start = torch.randint(-8, 9, (rows, columns)).float()
    c[:, :width] = 0.0  # of what a block has past the rows, and past the columns, anything is left
    c[:rows, :columns] = start
    first = dim // 2 // unit.elements * unit.elements
    given = a.T.contiguous() if kind == ACCUMULATE_TRANSPOSED else a
    product(library, name, kind, given, b, (*sizes, first), c)
    for begin in range(0, rows, unit.block_rows):
        end = min(begin + unit.block_rows, rows)
        low = first if begin // unit.block_rows % 2 else 0
        check(c[begin:end, :columns], a[begin:end, low:], b[low:], start[begin:end], integers)
        assert not c[begin:end, columns:width].any()
        assert c[begin:end, width:].isnan().all()


def test_every_word_of_an_operand_of_tiles_has_its_place(library: ctypes.CDLL) -> None:
    library.layouts.restype = ctypes.c_bool
    assert library.layouts()


def test_parts_of_an_element(library: ctypes.CDLL) -> None:
    parts = [units(library, name).parts for name in FORMATS]
    assert parts in ([3, 1, 2, 1, 1, 1], [1] * 6)
    assert (parts[0] == 3) == ("amx" in str(library))
