"""The CUDA kernel of paged_attention on the emulated GPU. test_emulated_kernels.py has its cases."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from torchweld import ops, reference
from torchweld.testing import Oracle
from torchweld.testing.paged_attention import PAGED_ATTENTION, PagedAttentionCase

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PAGED_ATTENTION, ids=lambda case: case.name)
def test_parity(case: PagedAttentionCase, dtype: torch.dtype, emulated: ModuleType) -> None:
    Oracle(case, dtype).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 9])
def test_splits_of_each_batch_of_its_own_length(emulated: ModuleType, queries: int, dtype: torch.dtype) -> None:
    """The longest sequence has three splits. The others have as many, some of them empty."""
    case = PagedAttentionCase(
        name="splits", regime="", batch=3, heads=4, kv_heads=2, queries=queries, keys=700, lengths=(700, 130, 20),
        causal=True, lse=True, sinks=True, spare=0,
    )  # fmt: skip
    Oracle(case, dtype).check()


def test_registered_op_and_the_layout_of_its_output(emulated: ModuleType) -> None:
    merged, cache = torch.randn(2, 5, 4, 16).transpose(1, 2), torch.randn(3, 8, 2, 16)
    table, lengths = torch.tensor([[2, 0], [1, 1]], dtype=torch.int32), torch.tensor([13, 6], dtype=torch.int32)
    arguments = (merged, cache, cache, table, lengths, torch.rand(4), None, 0.25, 0.0, -1, 0)
    torch.library.opcheck(torch.ops.torchweld.paged_attention.default, arguments)
    out = ops.paged_attention(merged, cache, cache, table, lengths)
    assert isinstance(out, torch.Tensor) and out.transpose(1, 2).is_contiguous()


def test_compiles_to_one_graph_for_all_lengths(emulated: ModuleType) -> None:
    def step(query: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        out, lse = ops.paged_attention(query.sin(), cache, cache, table, lengths, causal=True, return_lse=True)
        return out * lse.unsqueeze(-1)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, blocks in ((2, 3), (3, 5)):
        query, cache = torch.randn(batch, 4, 2, 16), torch.randn(blocks, 8, 2, 16)
        table = torch.randint(blocks, (batch, blocks), dtype=torch.int32)
        lengths = torch.randint(2, 8 * blocks, (batch,), dtype=torch.int32)
        torch.testing.assert_close(compiled(query, cache, table, lengths), step(query, cache, table, lengths))


def test_wrong_tables_and_lengths_never_leave_the_cache(emulated: ModuleType) -> None:
    """The kernel clamps block numbers to the cache and lengths to the table; the host reads neither."""
    q, k, v = torch.randn(3, 2, 1, 32), torch.randn(4, 16, 2, 32), torch.randn(4, 16, 2, 32)
    wrong = torch.tensor([[-5, 1], [3, 1 << 30], [2, 0]], dtype=torch.int32)
    right = torch.tensor([[0, 1], [3, 3], [2, 0]], dtype=torch.int32)
    found = ops.paged_attention(q, k, v, wrong, torch.tensor([20, 1 << 30, -4], dtype=torch.int32))
    expected = reference.paged_attention(q, k, v, right, torch.tensor([20, 32, 0], dtype=torch.int32))
    torch.testing.assert_close(found, expected)


def test_rows_between_which_others_lie(emulated: ModuleType) -> None:
    """Keys and values are one layer of a cache of several, and rows do not begin on 16 bytes."""
    q, cache = (
        torch.randn(2, 4, 1, 16),
        torch.randn(5, 2, 2, 8, 2, 17),
    )  # (blocks, layers, key and value, rows, heads, D)
    table, lengths = torch.tensor([[4, 0], [1, 3]], dtype=torch.int32), torch.tensor([13, 16], dtype=torch.int32)
    for size in (slice(0, 16), slice(1, 17)):
        k, v = (cache[:, 1, n, ..., size] for n in (0, 1))
        torch.testing.assert_close(
            ops.paged_attention(q, k, v, table, lengths), reference.paged_attention(q, k, v, table, lengths)
        )
