"""Cases of attention: sizes around the kernels' tiles, and every modifier of the scores."""

from __future__ import annotations

from torchweld.testing.attention_case import AttentionCase
from torchweld.testing.attention_packed import PackedAttentionCase
from torchweld.testing.case import Case

__all__ = ["ATTENTION", "AttentionCase", "PackedAttentionCase"]


def _case(name: str, regime: str, queries: int, keys: int, **flags: object) -> Case:
    return AttentionCase(name=name, regime=regime, queries=queries, keys=keys, **flags)  # type: ignore[arg-type]


def _packed(name: str, regime: str, *lengths: tuple[int, int], **flags: object) -> Case:
    queries, keys = (sum(pair[side] for pair in lengths) for side in (0, 1))
    return PackedAttentionCase(name=name, regime=regime, queries=queries, keys=keys, lengths=lengths, **flags)  # type: ignore[arg-type]


ATTENTION = (
    _case("64 x 64", "one tile", 64, 64),
    _case("1 x 1", "one key: dquery and dkey are 0, all of them cancels", 1, 1, dim=8),
    _case("0 x 5", "no queries", 0, 5),
    _case("1 x 300", "decoding: one query, many keys", 1, 300, heads=4, kv_heads=1),
    _case("5 x 3", "far less than a tile", 5, 3),
    _case("67 x 131", "prime: ragged tiles on both sides", 67, 131),
    _case("200 x 200 causal", "tiles above, on and below the diagonal", 200, 200, causal=True),
    _case("257 x 257 causal", "batches and heads, a tile of one row", 257, 257, batch=2, heads=4, causal=True),
    _case("40 x 100 causal", "aligned to the first key: most keys unseen", 40, 100, causal=True, unseen_nan=True),
    _case("40 x 100 causal, cache", "aligned to the last key", 40, 100, causal=True, bottom_right=True),
    _case("100 x 40 causal, cache", "rows that see nothing", 100, 40, causal=True, bottom_right=True, lse=True),
    _case("33 x 70, D 128", "a wide head", 33, 70, dim=128),
    _case("33 x 70, D 80", "a head that is no power of two", 33, 70, dim=80),
    _case("33 x 70, D 7", "a head that is no whole vector", 33, 70, dim=7),
    _case("33 x 70, D 256", "the widest head", 33, 70, dim=256),
    _case("33 x 70, Dv 40", "values narrower than the keys", 33, 70, value_dim=40),
    _case("GQA 8:2", "query heads share key heads", 50, 90, heads=8, kv_heads=2, causal=True),
    _case("merged heads", "non-contiguous: (B, N, H, D) in memory", 70, 70, batch=2, merged=True, causal=True),
    _case("window (16, 0)", "tiles left of the window are skipped", 150, 150, causal=True, window=(16, None)),
    _case("window (9, 5)", "a band, not causal", 90, 90, window=(9, 5)),
    _case("softcap 5", "scores bounded", 60, 60, softcap=5.0, logits=20.0),
    _case("ALiBi", "bias by distance", 90, 90, heads=4, causal=True, alibi=True),
    _case("dropout 0.2", "the same mask forward and backward", 60, 130, dropout=0.2, causal=True, bottom_right=True),
    _case("sinks", "one more term in the denominator", 60, 60, sinks=True, causal=True),
    _case("bias", "additive, with a gradient of full size", 40, 70, bias=(1, 2, 40, 70)),
    _case("bias by key", "additive, broadcast: its gradient is a sum", 40, 70, batch=2, bias=(2, 1, 1, 70)),
    _case("mask", "boolean, a row without a key", 40, 70, bias=(1, 1, 40, 70), masks=True),
    _case("lse", "the denominator's logarithm and its gradient", 60, 60, lse=True),
    _case("logits of 1e4", "softmax picks one key", 60, 60, logits=1e4),
    _packed("packed", "sequences of all sizes, some empty", (40, 40), (0, 0), (1, 1), (130, 130), (7, 7), causal=True),
    _packed(
        "packed, cache",
        "unlike lengths, everything at once",
        (3, 90),
        (5, 0),
        (1, 33),
        (0, 4),
        (60, 60),
        heads=4,
        kv_heads=2,
        causal=True,
        bottom_right=True,
        window=(50, None),
        alibi=True,
        sinks=True,
        lse=True,
        dropout=0.1,
    ),
)
