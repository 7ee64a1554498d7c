"""attention for a few queries over many keys and no gradient: the kernel that a KV cache meets."""

from __future__ import annotations

import pytest
import torch

from torchweld import ops
from torchweld.testing import assert_parity
from torchweld.testing.attention import AttentionCase, PackedAttentionCase


def wide(name: str, queries: int, keys: int, **flags: object) -> AttentionCase:
    return AttentionCase(name=name, regime="", queries=queries, keys=keys, **flags)  # type: ignore[arg-type]


DECODING = [
    *(wide(f"1 x {n}", 1, n, dim=40) for n in (1, 17, 255, 256, 257, 1000)),
    *(wide(f"D {d}", 1, 300, dim=d, value_dim=300 - d) for d in (1, 7, 64, 97)),
    wide("4 x 600, cache", 4, 600, causal=True, bottom_right=True, merged=True, batch=2),
    wide("GQA 4:1", 1, 600, heads=8, kv_heads=2),
    wide("GQA 8:1", 1, 600, heads=16, kv_heads=2, merged=True, batch=2),
    wide("16 rows", 4, 530, heads=8, kv_heads=2, causal=True, bottom_right=True, value_dim=40),
    wide("30 rows", 5, 300, heads=6, kv_heads=1, dim=96, value_dim=100),
    wide("window", 3, 900, causal=True, bottom_right=True, window=(300, None)),
    wide("rows that see nothing", 4, 2, causal=True, bottom_right=True),
    wide("mask", 2, 70, bias=(1, 1, 2, 70), masks=True),
    wide("everything", 2, 700, heads=4, kv_heads=2, causal=True, bottom_right=True, window=(500, None), softcap=3.0,
         bias=(1, 4, 2, 700), alibi=True, sinks=True),
    wide("dropout", 2, 700, dropout=0.3, causal=True, bottom_right=True),
    PackedAttentionCase(name="packed", regime="", queries=4, keys=873, lengths=((1, 600), (0, 3), (2, 270), (1, 0)),
                        heads=4, kv_heads=2, causal=True, bottom_right=True, dropout=0.1, alibi=True, sinks=True),
]  # fmt: skip


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", DECODING, ids=lambda case: case.name)
def test_decoding(case: AttentionCase, dtype: torch.dtype, isa: str, threads: None) -> None:
    """Few queries and no gradient: keys and values are read in splits, where they lie."""
    x = {n: t for n, t in case.inputs(dtype).items() if n != "doutput"}
    wider = {n: t.double() if t.is_floating_point() else t for n, t in x.items()}
    torch.set_num_threads(1)
    with torch.no_grad():
        ours, theirs, exact = case.ours(x), case.torch(x), case.reference(wider)
        torch.set_num_threads(3)
        assert torch.equal(case.ours(x)["output"], ours["output"])
    terms = case.terms({**wider, "doutput": exact["output"]})
    assert_parity(ours, theirs, exact, op="attention", case=case.name, terms=terms)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_a_value_without_weight_may_be_not_a_number(dtype: torch.dtype, isa: str) -> None:
    """The end of a KV cache that was never written."""
    q, k, v = (torch.randn(2, h, n, 32).to(dtype) for h, n in ((4, 1), (2, 300), (2, 300)))
    expected = ops.attention(q, k[:, :, :77], v[:, :, :77])
    k[:, :, 77:], v[:, :, 77:] = torch.nan, torch.nan
    torch.testing.assert_close(ops.attention(q, k, v, bias=torch.arange(300) < 77), expected)
