"""The definition of attention, held to a scalar loop, to torch's own function and to its own derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchweld import reference


def r(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def by_loops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Callable[[int, int], bool],
    score: Callable[..., Any],
    sinks: list[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """One score at a time. visible(i, j), score(b, h, i, j, product)."""
    (batch, heads, queries, size), (_, kv_heads, keys, _) = q.shape, k.shape
    out, lse = q.new_zeros(batch, heads, queries, v.shape[-1]), q.new_full((batch, heads, queries), -math.inf)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // kv_heads)
            for i in range(queries):
                seen = [j for j in range(keys) if visible(i, j)]
                weights = [math.exp(score(b, h, i, j, float(q[b, h, i] @ k[b, g, j]) / math.sqrt(size))) for j in seen]
                total = sum(weights) + (math.exp(sinks[h]) if sinks else 0.0)
                if total > 0:
                    out[b, h, i] = sum((w * v[b, g, j] for w, j in zip(weights, seen, strict=True)), v.new_zeros(()))
                    out[b, h, i] /= total
                    lse[b, h, i] = math.log(total)
    return out, lse


@pytest.mark.parametrize("align", ["top_left", "bottom_right"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, (2, None), (None, 1), (1, 2), (0, 0)])
@pytest.mark.parametrize(("queries", "keys"), [(4, 7), (7, 4)])
def test_band(align: str, causal: bool, window: tuple[int | None, int | None] | None, queries: int, keys: int) -> None:
    q, k, v = r(1, 2, queries, 3), r(1, 2, keys, 3), r(1, 2, keys, 2)
    shift = keys - queries if align == "bottom_right" else 0
    left, right = window or (None, None)

    def visible(i: int, j: int) -> bool:
        return (
            (not causal or j <= i + shift)
            and (left is None or j >= i + shift - left)
            and (right is None or j <= i + shift + right)
        )

    got = reference.attention(q, k, v, causal=causal, window=window, causal_align=align, return_lse=True)
    torch.testing.assert_close(got, by_loops(q, k, v, visible, lambda b, h, i, j, s: s))


def test_scores_are_capped_then_biased_then_sloped() -> None:
    q, k, v, bias = r(2, 4, 3, 5) * 3, r(2, 2, 6, 5), r(2, 2, 6, 4), r(2, 1, 3, 6)
    slopes, sinks = torch.rand(2, 4), torch.randn(4)

    def score(b: int, h: int, i: int, j: int, s: float) -> float:
        return 1.5 * math.tanh(s / 1.5) + float(bias[b, 0, i, j]) - float(slopes[b, h]) * abs(i + 3 - j)

    got = reference.attention(
        q, k, v, softcap=1.5, bias=bias, alibi_slopes=slopes, sinks=sinks, causal_align="bottom_right", return_lse=True
    )
    torch.testing.assert_close(got, by_loops(q, k, v, lambda i, j: True, score, sinks.tolist()))


@pytest.mark.parametrize("gqa", [False, True])
@pytest.mark.parametrize("mask", ["none", "causal", "boolean", "additive"])
def test_agrees_with_torch(mask: str, gqa: bool) -> None:
    heads = 2 if gqa else 4
    q, k, v = r(2, 4, 5, 6), r(2, heads, 8, 6), r(2, heads, 8, 6)
    attn_mask = {"boolean": r(5, 8) > -1, "additive": r(4, 5, 8)}.get(mask)
    arguments = {"attn_mask": attn_mask, "is_causal": mask == "causal", "scale": 0.4, "enable_gqa": gqa}
    torch.testing.assert_close(
        reference.scaled_dot_product_attention(q, k, v, **arguments),  # type: ignore[arg-type]
        F.scaled_dot_product_attention(q, k, v, **arguments),  # type: ignore[arg-type]
    )


def test_packed_sequences_are_separate_calls() -> None:
    lens_q, lens_k = torch.tensor([0, 3, 3, 7], dtype=torch.int32), torch.tensor([0, 5, 6, 10], dtype=torch.int32)
    q, k, v, slopes = r(7, 4, 5), r(10, 2, 5), r(10, 2, 3), torch.rand(3, 4)
    options = {"causal": True, "causal_align": "bottom_right", "return_lse": True}
    out, lse = reference.attention(
        q, k, v, alibi_slopes=slopes, cu_seqlens_q=lens_q, cu_seqlens_k=lens_k, **options  # type: ignore[arg-type]
    )  # fmt: skip
    assert out.shape == (7, 4, 3) and lse.shape == (4, 7)
    for n in range(3):
        rows, keys = slice(*lens_q[n : n + 2].tolist()), slice(*lens_k[n : n + 2].tolist())
        one = [t.transpose(0, 1).unsqueeze(0) for t in (q[rows], k[keys], v[keys])]
        want, want_lse = reference.attention(*one, alibi_slopes=slopes[n], **options)  # type: ignore[arg-type]
        torch.testing.assert_close(out[rows], want[0].transpose(0, 1))
        torch.testing.assert_close(lse[:, rows], want_lse[0])


def test_rows_that_see_nothing() -> None:
    """Zeros, lse of -inf or the sink, and gradients that are zero and not NaN."""
    q, k, v = (t.requires_grad_() for t in (r(1, 1, 5, 4), r(1, 1, 2, 4), r(1, 1, 2, 4)))
    out, lse = reference.attention(q, k, v, causal=True, causal_align="bottom_right", return_lse=True)
    assert (out[:, :, :3] == 0).all() and (lse[:, :, :3] == -math.inf).all() and lse[:, :, 3:].isfinite().all()
    grads = torch.autograd.grad([out, lse[:, :, 3:]], (q, k, v), [torch.ones_like(out), torch.ones_like(lse[:, :, 3:])])
    assert (grads[0][:, :, :3] == 0).all() and all(g.isfinite().all() for g in grads)
    sink = torch.tensor([0.7], dtype=torch.float64)
    out, lse = reference.attention(q, k, v, causal=True, causal_align="bottom_right", sinks=sink, return_lse=True)
    assert (out[:, :, :3] == 0).all() and torch.allclose(lse[:, :, :3], sink)


def test_keys_that_no_query_sees_may_hold_anything() -> None:
    q, k, v = r(1, 2, 3, 4), r(1, 2, 6, 4), r(1, 2, 6, 4)
    expected = reference.attention(q, k[:, :, :4], v[:, :, :4])
    k[:, :, 4:], v[:, :, 4:] = math.nan, math.nan
    mask = torch.arange(6) < 4
    torch.testing.assert_close(reference.attention(q, k, v, bias=mask), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_dtypes_are_computed_in_float32(dtype: torch.dtype) -> None:
    q, k, v = (r(1, 2, 30, 16).to(dtype) for _ in range(3))
    out, lse = reference.attention(q, k, v, return_lse=True)
    exact, exact_lse = reference.attention(q.double(), k.double(), v.double(), return_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out, exact.to(dtype))
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)


def test_first_and_second_derivatives() -> None:
    q, k, v = r(1, 2, 3, 4), r(1, 1, 5, 4), r(1, 1, 5, 2)
    inputs = [t.requires_grad_() for t in (q, k, v, r(2, 3, 5), r(2), torch.rand(2, dtype=torch.float64))]

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor, slopes: Tensor) -> Any:
        return reference.attention(
            q, k, v, causal=True, softcap=2.0, bias=bias, sinks=sinks, alibi_slopes=slopes, causal_align="bottom_right",
            return_lse=True,
        )  # fmt: skip

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)
