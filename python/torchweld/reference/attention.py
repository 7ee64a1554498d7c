"""Softmax attention (Vaswani et al.: arXiv:1706.03762) with all modifiers of the scores."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchweld.reference.philox import draw_seed, dropout_factors


def _visible(queries: int, keys: int, shift: int, left: int, right: int, device: torch.device) -> Tensor | None:
    """(Nq, Nk), True where key i + shift - left <= j <= i + shift + right; -1: unbounded. None where all are."""
    if left < 0 and right < 0:
        return None
    offset = torch.arange(keys, device=device) - (torch.arange(queries, device=device) + shift).unsqueeze(1)
    seen = torch.ones_like(offset, dtype=torch.bool)
    if left >= 0:
        seen = seen & (offset >= -left)
    if right >= 0:
        seen = seen & (offset <= right)
    return seen


def _band(causal: bool, window: tuple[int | None, int | None] | None) -> tuple[int, int]:
    """How many keys a query sees to the left and to the right of its own position; -1: all of them."""
    left, right = window if window is not None else (None, None)
    if causal:
        right = 0 if right is None else min(right, 0)
    return -1 if left is None else left, -1 if right is None else right


def _in_its_own_dtype(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(query, ...)` without autocast, which would round its matrix products."""

    @functools.wraps(function)
    def call(query: Tensor, *args: Any, **options: Any) -> Any:
        kind = query.device.type
        if not torch.amp.is_autocast_available(kind):
            return function(query, *args, **options)
        with torch.autocast(kind, enabled=False):
            return function(query, *args, **options)

    return call


@_in_its_own_dtype
def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    band: tuple[int, int],
    softcap: float,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout: Tensor | None,
    scale: float,
    bottom_right: bool,
) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(query.dtype, torch.float32)
    q, k, v = query.to(compute), key.to(compute), value.to(compute)
    heads, queries, keys = q.shape[1], q.shape[2], k.shape[2]
    if k.shape[1] != heads:
        k, v = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (k, v))
    shift = keys - queries if bottom_right else 0

    # A key that no query sees may be NaN, and 0 * NaN is NaN.
    seen = _visible(queries, keys, shift, *band, q.device)
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.atleast_2d(bias)
        seen = bias if seen is None else seen & bias
    if seen is not None:
        unseen = ~seen.any(-2).unsqueeze(-1)
        k, v = k.masked_fill(unseen, 0.0), v.masked_fill(unseen, 0.0)

    # Scores.
    scores = q @ k.transpose(-2, -1) * scale
    if softcap != 0:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None and bias.dtype != torch.bool:
        scores = scores + bias.to(compute)
    if alibi_slopes is not None:
        distance = torch.arange(queries, device=q.device).unsqueeze(1) + shift - torch.arange(keys, device=q.device)
        slopes = alibi_slopes.to(compute)
        scores = scores - slopes.reshape((*slopes.shape[:-1], -1, 1, 1)) * distance.abs()
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)

    # Softmax. A row that sees no key has the maximum -inf and the sum zero.
    top = scores.detach().amax(-1, keepdim=True) if keys > 0 else scores.new_full((*scores.shape[:-1], 1), -math.inf)
    sink = None if sinks is None else sinks.to(compute).reshape(-1, 1, 1)
    if sink is not None:
        top = torch.maximum(top, sink.detach())
    top = top.masked_fill(top == -math.inf, 0.0)
    p = torch.exp(scores - top)
    total = p.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - top)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (top + torch.log(total)).masked_fill(empty, -math.inf).squeeze(-1)
    p = p / total
    if dropout is not None:
        p = p * dropout.to(compute)
    return (p @ v).to(query.dtype), lse


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal_align: str = "top_left",
    deterministic: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scores) @ value, scores = query @ key^T * scale, soft-capped, biased and masked in this order.

    Arguments, shapes and result are those of `torchweld.ops.attention`; `deterministic` changes nothing here. Computed
    in float32 at least. Dropout is a mask of B * H * Nq rows (packed: H * total_q), and a column for each key of the
    sequence: see `philox.dropout_factors`.
    """
    band = _band(causal, window)
    scale = 1.0 / math.sqrt(max(query.shape[-1], 1)) if scale is None else scale
    bottom_right = causal_align == "bottom_right"
    if dropout_p > 0 and seed is None:
        seed = draw_seed(query.device)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        dropout = None
        if dropout_p > 0 and seed is not None:
            shape = (*query.shape[:3], key.shape[2])
            dropout = dropout_factors(seed, math.prod(shape[:3]), shape[3], dropout_p).view(shape)
        out, lse = _dense(query, key, value, band, softcap, bias, alibi_slopes, sinks, dropout, scale, bottom_right)
        return (out, lse) if return_lse else out

    # Packed sequences, one after the other.
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for name, starts, total in (("cu_seqlens_q", starts_q, query.shape[0]), ("cu_seqlens_k", starts_k, key.shape[0])):
        if starts[0] != 0 or starts[-1] != total or any(b < a for a, b in itertools.pairwise(starts)):
            raise ValueError(f"[attention] {name}: expected a sequence that rises from 0 to {total}, but got {starts}")
    outs, lses, dropout = [], [], None
    for n in range(len(starts_q) - 1):
        rows, columns = slice(starts_q[n], starts_q[n + 1]), slice(starts_k[n], starts_k[n + 1])
        if dropout_p > 0 and seed is not None:
            numbers = torch.arange(query.shape[0] * query.shape[1], device=seed.device).view(query.shape[1::-1])
            numbers, width = numbers[:, rows], starts_k[n + 1] - starts_k[n]
            dropout = dropout_factors(seed, numbers.flatten(), width, dropout_p).view(1, *numbers.shape, width)
        slopes = alibi_slopes[n] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        out, lse = _dense(
            query[rows].transpose(0, 1).unsqueeze(0),
            key[columns].transpose(0, 1).unsqueeze(0),
            value[columns].transpose(0, 1).unsqueeze(0),
            band,
            softcap,
            None,
            slopes,
            sinks,
            dropout,
            scale,
            bottom_right,
        )
        outs.append(out.squeeze(0).transpose(0, 1))
        lses.append(lse.squeeze(0))
    out = torch.cat(outs) if outs else query.new_zeros((*query.shape[:-1], value.shape[-1]))
    lse = torch.cat(lses, 1) if lses else query.new_zeros((query.shape[1], 0), dtype=torch.float32)
    return (out, lse) if return_lse else out


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, in float32 at least.

    Batch dimensions broadcast; a mask may add some of its own.
    """
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], dim=-3) for t in (key, value))
    batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    rows = (query.shape[-2], key.shape[-2])
    heads = math.prod(batch)
    q, k, v = (t.expand(*batch, *t.shape[-2:]).reshape(1, heads, *t.shape[-2:]) for t in (query, key, value))
    if attn_mask is not None and attn_mask.dim() > 2:
        attn_mask = attn_mask.expand(*batch, *rows).reshape(1, heads, *rows)
    out = attention(q, k, v, causal=is_causal, bias=attn_mask, dropout_p=dropout_p, scale=scale)
    assert isinstance(out, Tensor)
    return out.reshape(*batch, rows[0], value.shape[-1])
