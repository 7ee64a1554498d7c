"""Cases for every CUDA kernel of attention, whatever its tiles, and what each must give."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchweld import ops, reference
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


def hold_close(
    function: Callable[..., Any], definition: Callable[..., Any], leaves: dict[str, Tensor], dout: Tensor, tiny: float
) -> None:
    """Output and gradients are those of the definition in float64, but for the rounding of a few sums.

    What the leaves hold as NaN is 0 for the definition.
    """
    found = gradients(function, list(leaves.values()), dout)
    exact = gradients(definition, [t.nan_to_num().double() for t in leaves.values()], dout.double())
    for name, got, want in zip(("output", *(f"d{name}" for name in leaves)), found, exact, strict=True):
        step = 4 * torch.finfo(dout.dtype).eps * want.abs().max()
        assert (got.double() - want).abs().max() <= step + tiny, name


def hold_dropout(batch: int, queries: int, keys: int, dim: int, dtype: torch.dtype) -> None:
    """The forward and both backward kernels, whose tiles have different layouts, see the mask of the definition."""
    q, k, v, dout = (torch.randn(batch, 2, n, dim).to(dtype) for n in (queries, keys, keys, queries))
    seed = torch.tensor([-5_000_000_019])
    options: dict[str, Any] = {"dropout_p": 0.3, "seed": seed, "causal": True, "causal_align": "bottom_right"}
    ours, definition = (partial(module.attention, **options) for module in (ops, reference))
    hold_close(ours, definition, {"query": q, "key": k, "value": v}, dout, 1e-5)

    # The probabilities themselves: each value selects one key.
    eye = torch.eye(keys, dtype=dtype).expand(batch, 2, keys, keys)
    assert torch.equal(ours(q, k, eye) == 0, definition(q.double(), k.double(), eye.double()) == 0)


def hold_packed(lens_q: list[int], lens_k: list[int], dim: int, dtype: torch.dtype, **flags: Any) -> None:
    """Packed sequences that begin at `lens`, aligned to the last key, so that shifts differ.

    The keys of a sequence without queries are NaN and never read.
    """
    queries, keys = lens_q[-1], lens_k[-1]
    q, k, v, dout = (torch.randn(n, h, dim).to(dtype) for n, h in ((queries, 4), (keys, 2), (keys, 2), (queries, 4)))
    for i, begin in enumerate(lens_k[:-1]):
        if lens_q[i] == lens_q[i + 1]:
            k[begin : lens_k[i + 1]] = v[begin : lens_k[i + 1]] = torch.nan
    starts_q, starts_k = (torch.tensor(n, dtype=torch.int32) for n in (lens_q, lens_k))

    def call(module: Any, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, sinks: Tensor) -> Any:
        return module.attention(
            q, k, v, causal=True, causal_align="bottom_right", alibi_slopes=slopes, sinks=sinks,
            cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, seed=torch.tensor([7]), **flags,
        )  # fmt: skip

    leaves = {"query": q, "key": k, "value": v, "slopes": torch.rand(len(lens_q) - 1, 4), "sinks": torch.randn(4)}
    hold_close(partial(call, ops), partial(call, reference), leaves, dout, 2e-5)
