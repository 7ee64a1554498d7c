"""attention: the public function with every modifier of the scores, and packed sequences."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchweld.ops._arguments import check_dense, flag, integer, number, recordable, shown
from torchweld.ops._attention import ALIGNMENTS, Modifiers, Options
from torchweld.ops._attention_autograd import attend
from torchweld.ops._attention_checks import (
    check_band,
    check_bias,
    check_by_head,
    check_common,
    check_device,
    check_dropout,
    check_heads,
    check_sequences,
    check_softcap,
    fail,
)
from torchweld.ops._register import elsewhere
from torchweld.reference.philox import draw_seed

_TENSORS = ("query", "key", "value", "bias", "alibi_slopes", "sinks", "seed", "cu_seqlens_q", "cu_seqlens_k")


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = 0.0,
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
    """softmax(scores) @ value with tiled online softmax: O(N) memory, forward and backward.

    scores = query @ key^T * scale; softcap * tanh(scores / softcap); + bias; - slope * |i + shift - j|; and -inf where
    query i does not see key j. shift is 0 for `causal_align="top_left"`, as in torch, and Nk - Nq for "bottom_right",
    as with a KV cache. A row that sees no key gives zeros and zero gradients. Statistics and gradients accumulate in
    float32. Keys outside the band of `causal` and `window` are not read. A key near the edge of the band, and a key
    that only `bias` hides, have weight zero; a NaN in their values can reach rows of the same tile, as in torch. A CPU
    with AMX multiplies float32 in three parts, so an infinity gives NaN there.
    Dao et al.: FlashAttention, arXiv:2205.14135 and 2307.08691; Milakov, Gimelshein: arXiv:1805.02867.

    Args:
        query: (B, Hq, Nq, D), float32, bfloat16 or float16 (others, and on a GPU head sizes above 256, run on the
            reference). Packed: (total_q, Hq, D).
        key: (B, Hkv, Nk, D), Hq a multiple of Hkv. Packed: (total_k, Hkv, D).
        value: (B, Hkv, Nk, Dv). Packed: (total_k, Hkv, Dv).
        causal: query i sees keys up to i + shift.
        window: (left, right): query i sees keys i + shift - left to i + shift + right. None: no bound on that side.
        softcap: bounds the scores to (-softcap, softcap); 0 or None: no cap.
        bias: broadcasts to (B, Hq, Nq, Nk): boolean (True attends), or additive (query's dtype or float32) with a
            gradient.
        alibi_slopes: (Hq) or (B, Hq) (arXiv:2108.12409); has a gradient.
        sinks: (Hq), exp(sink) is added to the softmax's denominator (arXiv:2309.17453); has a gradient.
        dropout_p: probability that a weight is dropped. The other weights are multiplied by 1 / (1 - dropout_p).
        seed: int64 of one element. It decides which weights are dropped (Philox by row and key: the same on every
            backend). None: a seed from torch's default generator of the device.
        scale: 1 / sqrt(D) if None.
        cu_seqlens_q, cu_seqlens_k: int32 (B + 1), where each packed sequence starts, and the total; both or none. A
            sequence may be empty. The CPU checks the values. On a GPU wrong values give wrong rows, never a bad access.
        max_seqlen_q, max_seqlen_k: the length of the longest sequence, or more. A GPU then starts fewer idle blocks.
        causal_align: "top_left" or "bottom_right".
        deterministic: gradients have the same bits on every run. With False a GPU adds up gradients of 16 bits in any
            order: five products in place of seven, and float32 memory of query's size. False has no effect on the CPU,
            with alibi_slopes that require grad, and under torch.use_deterministic_algorithms(True).
        return_lse: also return the log of the softmax's denominator.

    Returns:
        (B, Hq, Nq, Dv) of query's dtype, in memory (B, Nq, Hq, Dv) if query is so; packed (total_q, Hq, Dv). With
        `return_lse` also lse, float32 (B, Hq, Nq), packed (Hq, total_q), which has a gradient.

    Raises:
        RuntimeError: a device, dtype or shape does not fit, or dropout_p is out of range.
        TypeError: query is not floating point of 16 bits or more, or an argument is of another type.
        ValueError: window, softcap, causal_align or the values of cu_seqlens are not as above.
    """
    op = "attention"
    tensors = (query, key, value, bias, alibi_slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k)
    if not isinstance(causal_align, str) or causal_align not in ALIGNMENTS:
        raise ValueError(f"[{op}] causal_align: expected 'top_left' or 'bottom_right', but got {shown(causal_align)}")
    softcap, dropout_p = check_softcap(op, softcap), check_dropout(op, dropout_p)
    causal = flag(op, "causal", causal)
    deterministic, return_lse = flag(op, "deterministic", deterministic), flag(op, "return_lse", return_lse)
    left, right = check_band(op, causal, window)
    scale = None if scale is None else number(op, "scale", scale, "a number or None")
    longest_q = -1 if max_seqlen_q is None else integer(op, "max_seqlen_q", max_seqlen_q, "an integer or None")
    longest_k = -1 if max_seqlen_k is None else integer(op, "max_seqlen_k", max_seqlen_k, "an integer or None")
    if theirs := elsewhere(attention, None, _TENSORS, *tensors):
        return theirs(
            query, key, value, causal=causal, window=window, softcap=softcap, bias=bias,
            alibi_slopes=alibi_slopes, sinks=sinks, dropout_p=dropout_p, seed=seed, scale=scale,
            cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
            causal_align=causal_align, deterministic=deterministic, return_lse=return_lse,
        )  # fmt: skip
    check_dense(op, query=query, key=key, value=value)
    check_common(op, query, key, value)
    if cu_seqlens_q is None and cu_seqlens_k is None:
        _check_layout(op, (query, key, value), "[batch, heads, rows, head size]", 4)
        check_heads(op, query, key, value)
        if bias is not None:
            check_bias(op, "bias", bias, query, (*query.shape[:3], key.shape[2]))
        batch = query.shape[0]
    else:
        _check_layout(op, (query, key, value), "[total, heads, head size]", 3)
        batch = check_sequences(op, query, cu_seqlens_q, cu_seqlens_k)
        check_heads(op, *(t.transpose(0, 1).unsqueeze(0) for t in (query, key, value)))
        if bias is not None:
            fail(op, "bias", "None beside cu_seqlens_q", "a tensor")
    check_by_head(op, query, batch, alibi_slopes, sinks)
    if seed is not None:
        check_device(op, "seed", seed, query)
        if seed.dtype is not torch.int64 or seed.numel() != 1:
            fail(op, "seed", "int64 of one element", f"{seed.dtype} of shape {list(seed.shape)}")
    elif dropout_p > 0:
        seed = draw_seed(query.device)
    modifiers = Modifiers(
        recordable(bias), alibi_slopes, sinks, seed if dropout_p > 0 else None, cu_seqlens_q, cu_seqlens_k
    )
    options = Options(
        scale=1.0 / math.sqrt(max(query.shape[-1], 1)) if scale is None else scale,
        softcap=softcap,
        left=left,
        right=right,
        bottom_right=causal_align == "bottom_right",
        dropout_p=dropout_p,
        max_seqlen_q=longest_q,
        max_seqlen_k=longest_k,
    )
    return attend(op, return_lse, query, key, value, modifiers, options, deterministic)


def _check_layout(op: str, tensors: tuple[Tensor, Tensor, Tensor], shape: str, dims: int) -> None:
    for name, t in zip(("query", "key", "value"), tensors, strict=True):
        if t.dim() != dims:
            fail(op, name, shape, f"shape {list(t.shape)}")
