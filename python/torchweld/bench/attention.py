"""attention, beside torch's scaled_dot_product_attention and each of its backends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchweld.bench.functional import works
from torchweld.bench.harness import Settings, Work
from torchweld.testing.attention import AttentionCase, PackedAttentionCase
from torchweld.testing.case import Provider, Tensors
from torchweld.testing.paged_attention import PagedAttentionCase


def _case(
    batch: int, heads: int, rows: int, dim: int, causal: bool = False, also: str = "", **flags: object
) -> AttentionCase:
    name = f"{batch} x {heads} x {rows} x {dim}" + (" causal" if causal else "") + also
    sizes = {"batch": batch, "heads": heads, "queries": rows, "keys": rows, "dim": dim, "causal": causal} | flags
    return AttentionCase(name=name, regime="bench", **sizes)  # type: ignore[arg-type]


_LENGTHS = 2 * (512, 384, 256, 200, 128, 100, 64, 50, 33, 17)

# The first five are sizes at which torch's own CPU kernel is fast. Then: short sequences, a bias with a gradient, a
# window, dropout (torch gets a mask made beforehand), packed sequences (torch is called for each), and one query over
# a long cache.
_CPU = (
    _case(1, 12, 1024, 64),
    _case(1, 12, 1024, 64, True),
    _case(1, 8, 4096, 64, True),
    _case(1, 8, 2048, 128),
    _case(1, 8, 2048, 128, True),
    _case(1, 12, 128, 64, True),
    _case(8, 12, 128, 64, True),
    _case(1, 1, 2048, 64, True),
    _case(1, 12, 1024, 64, also=", bias with gradient", bias=(1, 12, 1024, 1024)),
    _case(1, 8, 4096, 64, True, ", window 256", window=(256, None)),
    _case(1, 12, 1024, 64, True, ", dropout 0.1", dropout=0.1),
    PackedAttentionCase(
        name="12 x 64 causal, 20 packed sequences of 17 to 512",
        regime="bench",
        heads=12,
        queries=sum(_LENGTHS),
        keys=sum(_LENGTHS),
        causal=True,
        lengths=tuple((n, n) for n in _LENGTHS),
    ),
    _case(1, 32, 1, 128, also=", 8192 keys of 8 heads", keys=8192, kv_heads=8),
)


def square(tokens: int, width: int, rows: int, dim: int, causal: bool) -> AttentionCase:
    """As many sequences of `rows` as have `tokens` rows together, and as many heads as have `width` columns."""
    return _case(max(1, tokens // rows), width // dim, rows, dim, causal)


_CUDA = tuple(
    square(16384, 2048, rows, dim, causal)
    for dim in (64, 128, 256)
    for rows in (512, 1024, 2048, 4096, 8192, 16384)
    for causal in (False, True)
)
_BACKENDS = {"torch:flash": SDPBackend.FLASH_ATTENTION, "torch:cudnn": SDPBackend.CUDNN_ATTENTION}


def _pairs(case: AttentionCase) -> float:
    """Pairs of a query and a key that it sees: half of them if causal, a band if there is a window."""
    pairs = float(case.queries * case.keys)
    if isinstance(case, PackedAttentionCase):
        pairs = float(sum(queries * keys for queries, keys in case.lengths))
    if case.window is not None and case.window[0] is not None:
        pairs = float(sum(min(i, case.window[0]) + 1 for i in range(case.queries)))
    elif case.causal:
        pairs /= 2
    return case.batch * case.heads * pairs


def _by(kind: SDPBackend, case: AttentionCase, x: Tensors) -> Tensors:
    with sdpa_kernel(kind):
        return case.torch(x)


def attention(settings: Settings) -> Iterator[Work]:
    """Every size, dtype and direction."""
    chosen = (_CUDA if settings.device == "cuda" else _CPU)[: 2 if settings.quick else None]
    for dtype in settings.dtypes:
        for case in chosen:
            yield from attention_case(case, dtype, settings)


def attention_case(case: AttentionCase, dtype: torch.dtype, settings: Settings) -> Iterator[Work]:
    """One size in every direction. On a GPU torch's fused kernels take 16-bit types only."""
    kinds = _BACKENDS if settings.device == "cuda" and dtype.itemsize == 2 else {}
    others: dict[str, Provider] = {name: partial(_by, kind, case) for name, kind in kinds.items()}
    if kinds:  # the cost of determinism
        others["torchweld:atomics"] = replace(case, deterministic=False).ours
    # FLOPs: two products of 2 * D per pair forward (Q K^T, P V); backward five, P from the scores again.
    flops = {"forward": 4 * case.dim * _pairs(case), "backward": 10 * case.dim * _pairs(case)}
    sizes = {n: getattr(case, n) for n in ("name", "batch", "heads", "queries", "keys", "dim", "causal")}
    also = ("kv_heads", "window", "bias", "dropout", "lengths")
    sizes |= {n: value for n in also if (value := getattr(case, n, None))}
    cost = {direction: {"flops": count} for direction, count in flops.items()}
    yield from works(case, sizes, dtype, settings, cost, **others)


def _paged(heads: int, kv_heads: int, *lengths: int) -> PagedAttentionCase:
    name = f"{len(lengths)} x {heads} x 1 x 128, up to {max(lengths)} keys of {kv_heads} heads"
    sizes = {"batch": len(lengths), "queries": 1, "keys": max(lengths), "lengths": lengths, "dim": 128}
    return PagedAttentionCase(name=name, regime="bench", heads=heads, kv_heads=kv_heads, **sizes)  # type: ignore[arg-type]


_PAGED = (_paged(32, 8, 8192), _paged(32, 8, 2048, 1531, 900, 33, 1024, 700, 311, 1600))


def paged_attention(settings: Settings) -> Iterator[Work]:
    """One query over caches in blocks of 16 rows. For torch the blocks are gathered first."""
    settings = replace(settings, directions=tuple(d for d in settings.directions if d == "forward"))
    for dtype in settings.dtypes:
        for case in _PAGED[: 1 if settings.quick else None]:
            names = ("name", "batch", "heads", "kv_heads", "queries", "dim", "lengths", "block_size")
            # Bytes: each key and value is read once.
            cost = {"bytes": 2.0 * sum(case.lengths) * (case.kv_heads or case.heads) * case.dim * dtype.itemsize}
            yield from works(case, {n: getattr(case, n) for n in names}, dtype, settings, {"forward": cost})
