"""Cases for every CUDA kernel of attention, whatever its tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchweld.testing.attention import AttentionCase


def case(regime: str, queries: int, keys: int, **flags: object) -> AttentionCase:
    return AttentionCase(name=regime, regime=regime, queries=queries, keys=keys, **flags)  # type: ignore[arg-type]


# By what comes between the products and the softmax.
MODIFIERS = [
    case("ALiBi in a window", 70, 90, heads=2, alibi=True, window=(20, 3), merged=True),
    case("softcap and bias", 40, 70, softcap=3.0, bias=(1, 1, 40, 70), logits=4.0, lse=True),
    case("sinks", 40, 70, sinks=True, causal=True, bottom_right=True),
    case("bias by row", 70, 40, batch=2, bias=(2, 2, 70, 1)),
    case("bias by key", 70, 40, batch=2, bias=(1, 2, 1, 40)),
    case("bias by head alone", 70, 40, bias=(1, 2, 1, 1), causal=True),
    case("mask", 40, 70, heads=4, kv_heads=2, bias=(1, 1, 40, 70), masks=True),
    case("rows that see nothing, lse", 100, 40, heads=1, causal=True, bottom_right=True, lse=True),
    case("a value that is not seen may be NaN", 40, 100, heads=1, causal=True, unseen_nan=True),
    case("one query", 1, 70, heads=4, kv_heads=2),
    case("one key: dquery and dkey cancel", 3, 1, dim=8),
]


# Of Hopper's tiles: two of 128 or 192 own rows and several of 64 or 128 streamed ones, none of them whole.
TILES = [
    case("D 64: more tiles than slots", 200, 700, heads=1),
    case("D 64, causal", 420, 330, heads=1, causal=True, bottom_right=True, lse=True),
    case("D 40 and 56, padded; the slots go round with the heads of a group", 90, 150, dim=40, value_dim=56, heads=4,
         kv_heads=1, causal=True),
    case("D 128", 150, 400, dim=128, heads=1, batch=2, merged=True),
    case("D 128, causal, GQA", 300, 260, dim=128, heads=2, kv_heads=1, causal=True),
    case("D 98 and 101, element by element", 70, 150, dim=98, value_dim=101, heads=1),
    case("D 256: one gradient at a time", 150, 300, dim=256, heads=1, causal=True),
    case("D 200, capped", 70, 150, dim=200, heads=1, softcap=2.0),
    case("D 256, a bias: no room for its four tiles at once", 70, 150, dim=256, bias=(1, 1, 70, 150)),
    case("a window that begins inside of a tile", 300, 300, heads=1, window=(50, 20)),
    case("bias, softcap and ALiBi over two tiles", 150, 200, bias=(1, 1, 150, 200), alibi=True, softcap=3.0),
    case("a mask over whole tiles", 140, 150, heads=1, bias=(1, 1, 140, 150), masks=True),
    case("no keys", 30, 0, heads=1, lse=True),
]  # fmt: skip


def gradients(function: Callable[..., Any], leaves: list[Tensor], dout: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in leaves]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]
