"""paged_attention: attention over a cache in blocks, whose lengths the host does not know."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from torchweld import backend, ops, reference
from torchweld.testing import Oracle
from torchweld.testing.paged_attention import PAGED_ATTENTION, PagedAttentionCase

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def ints(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


Q, K, V = torch.randn(2, 4, 1, 8), torch.randn(5, 3, 2, 8), torch.randn(5, 3, 2, 6)
TABLE, LENGTHS = ints([4, 1, 99], [3, 0, 2]), ints(4, 8)
ARGUMENTS: dict[str, Any] = {
    "query": Q,
    "key_cache": K,
    "value_cache": V,
    "block_table": TABLE,
    "cache_seqlens": LENGTHS,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PAGED_ATTENTION, ids=lambda case: case.name)
def test_parity(case: PagedAttentionCase, dtype: torch.dtype, threads: None, each_isa: Iterator[str]) -> None:
    """What lies past a batch's keys, and in blocks of nobody, is NaN. The same bits at any number of threads."""
    oracle = Oracle(case, dtype)
    for _ in each_isa:
        with backend.strict():
            oracle.check()
        found = []
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(case.ours(oracle.inputs[0])["output"])
        assert torch.equal(*found)


def test_gathers_the_rows_that_the_table_lists() -> None:
    out = ops.paged_attention(**ARGUMENTS)
    for b, rows in enumerate(([(4, 0), (4, 1), (4, 2), (1, 0)], [(n, r) for n in (3, 0, 2) for r in range(3)][:8])):
        key, value = (torch.stack([cache[n, r] for n, r in rows], 1).unsqueeze(0) for cache in (K, V))
        torch.testing.assert_close(out[b : b + 1], ops.attention(Q[b : b + 1], key, value))


def test_a_cache_of_one_piece_for_each_batch() -> None:
    q, k, v = torch.randn(3, 4, 2, 16), torch.randn(3, 50, 2, 16), torch.randn(3, 50, 2, 16)
    lengths = ints(50, 7, 2)
    out, lse = ops.paged_attention(
        q, k, v, torch.arange(3, dtype=torch.int32)[:, None], lengths, causal=True, return_lse=True
    )
    for b, n in enumerate(lengths.tolist()):
        expected = ops.attention(
            q[b : b + 1], k[b : b + 1, :n].transpose(1, 2), v[b : b + 1, :n].transpose(1, 2), causal=True,
            causal_align="bottom_right", return_lse=True,
        )  # fmt: skip
        for got, want in zip((out[b : b + 1], lse[b : b + 1]), expected, strict=True):
            torch.testing.assert_close(got, want)


def test_strides() -> None:
    wide = [torch.randn(*t.shape[:3], 2 * t.shape[3]) for t in (Q, K, V)]
    q, k, v = (t[..., ::2] for t in wide)
    found = ops.paged_attention(q, k, v, TABLE, LENGTHS)
    q, k, v = (t.contiguous() for t in (q, k, v))
    torch.testing.assert_close(found, ops.paged_attention(q, k, v, TABLE, LENGTHS))
    merged = torch.randn(2, 5, 4, 8).transpose(1, 2)
    out = ops.paged_attention(merged, K, V, TABLE, LENGTHS)
    torch.testing.assert_close(out, ops.paged_attention(merged.contiguous(), K, V, TABLE, LENGTHS))


@pytest.mark.parametrize("shape", [(0, 4, 1, 8), (2, 4, 0, 8)], ids=["no batch", "no queries"])
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    query = torch.randn(shape)
    out, lse = ops.paged_attention(query, K, V, TABLE[: shape[0]], LENGTHS[: shape[0]], return_lse=True)
    assert out.shape == (*shape[:3], 6) and lse.shape == shape[:3]


def test_without_blocks_there_are_no_keys() -> None:
    out, lse = ops.paged_attention(Q, K[:0], V[:0], TABLE[:, :0], ints(0, 0), return_lse=True)
    assert not out.any() and bool((lse == -torch.inf).all())


def test_float64_runs_on_the_definition() -> None:
    wide = {n: t.double() if t.is_floating_point() else t for n, t in ARGUMENTS.items()}
    out: Any = ops.paged_attention(**wide, causal=True)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out.float(), ops.paged_attention(**ARGUMENTS, causal=True))


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    "query of three dimensions": ({"query": Q[0]}, RuntimeError, ["query", "[4, 1, 8]"]),
    "cache of three": ({"key_cache": K[0]}, RuntimeError, ["key_cache", "[blocks, block size, heads, head size]"]),
    "head size": ({"key_cache": K[..., :7]}, RuntimeError, ["key_cache", "head size 8", "7"]),
    "value": ({"value_cache": V[:4]}, RuntimeError, ["value_cache", "[5, 3, 2]", "[4, 3, 2, 6]"]),
    "heads": ({"query": Q[:, :3]}, RuntimeError, ["key_cache", "divides query's 3", "2"]),
    "blocks without rows": ({"key_cache": K[:, :0], "value_cache": V[:, :0]}, RuntimeError, ["key_cache", "one row"]),
    "dtype": ({"value_cache": V.double()}, RuntimeError, ["key_cache, value_cache", "torch.float32", "torch.float64"]),
    "integers": ({"query": Q.long()}, TypeError, ["query", "torch.int64"]),
    "table's dtype": ({"block_table": TABLE.long()}, RuntimeError, ["block_table", "int32", "torch.int64", ".int()"]),
    "table's shape": ({"block_table": TABLE[:1]}, RuntimeError, ["block_table", "batch of 2", "[1, 3]"]),
    "lengths' shape": ({"cache_seqlens": LENGTHS[None]}, RuntimeError, ["cache_seqlens", "[batch]", "[1, 2]"]),
    "softcap": ({"softcap": -1.0}, ValueError, ["softcap", "-1.0"]),
    "window": ({"window": (-3, 0)}, ValueError, ["window", "(-3, 0)"]),
    "sinks": ({"sinks": torch.zeros(3)}, RuntimeError, ["sinks", "[4]", "[3]"]),
    "slopes": ({"alibi_slopes": torch.zeros(3, 4)}, RuntimeError, ["alibi_slopes", "[4] or [2, 4]", "[3, 4]"]),
    "a gradient": ({"query": Q.clone().requires_grad_()}, RuntimeError, ["no gradient", "torch.no_grad()"]),
    "too long": ({"cache_seqlens": ints(4, 10)}, ValueError, ["cache_seqlens", "0 to 9", "10 at index 1"]),
    "less than nothing": ({"cache_seqlens": ints(-1, 3)}, ValueError, ["cache_seqlens", "0 to 9", "-1 at index 0"]),
    "a block too far": ({"cache_seqlens": ints(7, 8)}, ValueError, ["block_table", "0 to 4", "99 at index 0, 2"]),
    "a block before": ({"block_table": -TABLE}, ValueError, ["block_table", "0 to 4", "-4 at index 0, 0"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["kernels", "reference"])
@pytest.mark.parametrize("name", REFUSED)
def test_names_what_is_wrong(name: str, kind: str) -> None:
    options, error_type, words = REFUSED[name]
    with pytest.raises(error_type) as error:
        if kind == "reference":
            with backend.use_backend("reference"):
                ops.paged_attention(**(ARGUMENTS | options))
        else:
            ops.paged_attention(**(ARGUMENTS | options))
    assert all(word in str(error.value) for word in ["[paged_attention]", *words]), str(error.value)


def test_no_gradient_is_needed_without_grad_mode() -> None:
    with torch.no_grad():
        out = ops.paged_attention(**ARGUMENTS | {"query": Q.clone().requires_grad_()})
    torch.testing.assert_close(out, reference.paged_attention(**ARGUMENTS))


def test_flops_are_those_of_the_keys_that_are_there() -> None:
    with FlopCounterMode(display=False) as counter:
        ops.paged_attention(**ARGUMENTS)
    assert counter.get_total_flops() == 2 * (4 + 8) * 4 * (8 + 6)
