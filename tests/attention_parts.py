"""A part of a longer attention: its place against the keys, and its part of the dropout mask."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from torchweld import reference
from torchweld.ops._attention import Modifiers, Options, backward_op, forward_op

N, CUT = 256, 128  # rows of the whole, and where it is cut


def whole(**modifiers: object) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Inputs, the output and the gradients of the inputs of an attention of N queries and keys, by the definition."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 2, N, 16, requires_grad=True) for _ in range(3)]
    out = reference.attention(*(t.double() for t in inputs), **modifiers)  # type: ignore[arg-type]
    assert isinstance(out, Tensor)
    out[:, :, CUT:].sum().backward()
    return inputs, out, [t.grad for t in inputs if t.grad is not None]


WINDOWS: list[tuple[int | None, int | None]] = [(300, None), (150, 20), (30, 0), (None, 0)]


def check_offset(window: tuple[int | None, int | None], alibi: bool) -> None:
    """The last queries over the keys that the band leaves them: all of their keys from CUT - 64 on."""
    begin = CUT - 64 if window[0] == 30 else 0
    slopes = torch.tensor([0.05, 0.3]) if alibi else None
    (q, k, v), out, grads = whole(window=window, alibi_slopes=slopes)
    left, right = (-1 if bound is None else bound for bound in window)
    options = Options(1 / math.sqrt(16), left=left, right=right, offset=CUT - begin)
    parts = [q[:, :, CUT:].detach(), k[:, :, begin:].detach(), v[:, :, begin:].detach()]
    found, _, statistics = forward_op(*parts, Modifiers(alibi_slopes=slopes), options, 2)
    torch.testing.assert_close(found, out[:, :, CUT:].float())
    mask = [True] * 3 + [False] * 3
    dq, dk, dv, *_ = backward_op(
        torch.ones_like(found), None, found, statistics, *parts, Modifiers(alibi_slopes=slopes), options, mask, True
    )
    for got, expected in ((dq, grads[0][:, :, CUT:]), (dk, grads[1][:, :, begin:]), (dv, grads[2][:, :, begin:])):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def check_mask() -> None:
    """Head 1 of batch 1, its last queries and keys: the same elements are dropped as in the whole."""
    seed, p = torch.tensor([1234567]), 0.4
    factors = reference.philox.dropout_factors(seed, 2 * 2 * N, N, p).view(2, 2, N, N).float()
    q, k = torch.zeros(1, 1, N - CUT, 16), torch.zeros(1, 1, N - 192, 16)
    v = torch.eye(64).view(1, 1, 64, 64)  # the output is the weights
    options = Options(1.0, dropout_p=p, mask_first=(1 * 2 + 1) * N + CUT, mask_heads=2, mask_queries=N, mask_column=192)
    found = forward_op(q, k, v, Modifiers(seed=seed), options, 2)[0]
    torch.testing.assert_close(found[0, 0], factors[1, 1, CUT:, 192:] / 64)
    halves = Options(1.0, dropout_p=p, mask_first=N, mask_heads=2, mask_queries=N, mask_column=192)
    q, k, v = (t.expand(2, 1, -1, -1) for t in (torch.zeros(1, 1, N, 16), k, v))  # head 1 of both batches
    found = forward_op(q, k, v, Modifiers(seed=seed), halves, 2)[0]
    torch.testing.assert_close(found[:, 0], factors[:, 1, :, 192:] / 64)
    with pytest.raises(ValueError, match=r"\[attention\] mask_column: expected a multiple of 64, but got 100"):
        forward_op(q, k, v, Modifiers(seed=seed), halves._replace(mask_column=100), 2)


def check_part() -> None:
    """The backward over halves of the keys, by the output and statistics of all: the sums are those of one call."""
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(1, 2, 96, 16) for _ in range(4))
    slopes, dlse = torch.tensor([0.05, 0.3]), torch.randn(1, 2, 96)
    modifiers, options = Modifiers(alibi_slopes=slopes), Options(0.25, left=60, right=10)
    out, _, statistics = forward_op(q, k, v, modifiers, options, 2)
    mask = [True] * 3 + [False, True, False]
    dq, dk, dv, _, dslopes, _ = backward_op(dout, dlse, out, statistics, q, k, v, modifiers, options, mask, True)
    halves = [
        backward_op(
            dout, dlse, out, statistics, q, k[:, :, rows], v[:, :, rows], modifiers,
            options._replace(part=True, offset=-rows.start), mask, True,
        )
        for rows in (slice(0, 48), slice(48, 96))
    ]  # fmt: skip
    for index, expected in ((0, dq), (4, dslopes)):
        torch.testing.assert_close(halves[0][index] + halves[1][index], expected, rtol=1e-4, atol=1e-5)
    for index, expected in ((1, dk), (2, dv)):
        torch.testing.assert_close(torch.cat([half[index] for half in halves], 2), expected, rtol=1e-4, atol=1e-5)
