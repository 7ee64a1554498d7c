"""The rounding errors of attention, for the rule of exactness: sizes of the terms to first order, and exact zeros.

With S the scores, P the weights, dP = dO V^T and dS = P * (dP - delta + dlse), delta the row's sum of P * dP.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchweld.testing.case import Tensors


def sizes(
    x: Tensors,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    kept: Tensor,
    scale: float,
    softcap: float,
    away: Tensor,
    group: int,
) -> Tensors:
    """By output, the terms that rounding acts on; `key` and `value` by query head, all of it in float64.

    A relative error e of every product makes one of e * size, size being sum|q||k| * scale for a score. Where one
    product is nearly all of a score, its D additions count for more: each may round a sum as large as the score, which
    makes a random walk of steps of 1 / sqrt(12). An error d of the scores makes one of
    P_j * ((1 - P_j) d_j - sum over the other k of P_k d_k) of a weight: nothing where one key has all of it, unless
    another is so close that errors decide between the two. Each weight, product and sum has an error of its own beside
    that.

    The backward makes the weights again from lse, whose logarithm of the sum (not its maximum, which the scores have in
    common) was rounded. In lse the score itself stands, with the walk.

    The slope of the softcap, 1 - tanh(x)^2, moves by 2 tanh(x) times the error of x, as a share of itself; and the
    definition's, a difference in float64, is off by a rounding of that.
    """
    q, do, k, v = (t.abs() for t in (x["query"], x["doutput"], key, value))
    dlse = x["dlse"].unsqueeze(-1) if "dlse" in x else torch.zeros((), dtype=q.dtype, device=q.device)

    walk = math.sqrt(q.shape[-1] / 12)
    product = x["query"] @ key.mT * scale
    score = q @ k.mT * abs(scale)
    slope: Tensor | float = 1.0
    moved: Tensor | float = 0.0
    if softcap:
        capped = torch.tanh(product / softcap)
        slope = 1 - capped.square()
        moved = slope * (1 + 2 * capped.abs() * score / softcap)
        moved = moved + torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        score = score * slope + softcap * capped.abs()
    lse = 1 + (weights * score).sum(-1) * max(1.0, walk)
    score = torch.maximum(score, walk * (product * slope).abs())
    shared = (weights * score).sum(-1, keepdim=True)
    inexact = weights * (1 + score * (1 - weights).abs() + (shared - weights * score).abs())
    inexact = inexact + _undecided(weights, score) / torch.finfo(torch.float32).eps
    again = inexact + weights * _log_of_sum(weights)

    dweights, signed = kept * (do @ v.mT), kept * (x["doutput"] @ value.mT)
    gap = (signed - (weights * signed).sum(-1, keepdim=True) + dlse).abs()
    row = (weights * dweights).sum(-1, keepdim=True) + (again * gap).sum(-1, keepdim=True)
    ds = weights * (dweights + row + dlse.abs()) + again * gap
    dproduct = ds * slope + weights * gap * moved

    found = {
        "output": (kept * inexact) @ v,
        "lse": lse,
        "dquery": dproduct @ k * abs(scale),
        "dkey": _by_key_head(dproduct.mT @ q * abs(scale), group),
        "dvalue": _by_key_head((kept * again).mT @ do, group),
    }
    if "bias" in x and x["bias"].is_floating_point():
        found["dbias"] = ds.sum_to_size(x["bias"].shape)
    if "alibi_slopes" in x:
        found["dalibi_slopes"] = (ds * away.abs()).sum((-2, -1)).sum_to_size(x["alibi_slopes"].shape)
    if "sinks" in x:
        left = (1 - weights.sum(-1, keepdim=True)).clamp(min=0)
        found["dsinks"] = (left * (1 + shared) * (row + dlse.abs())).sum((0, 2, 3))
    return found


def zeros(x: Tensors, seen: Tensor, kept: Tensor, more: bool, group: int) -> Tensors:
    """For each output, where it is 0 in any arithmetic. `seen` (B, H, Nq, Nk): whether a query may have weight on a
    key.

    A row that sees nothing has no output and no gradient. One that sees a single key has the weight 1 whatever the
    score, unless there is `more` (a sink, a gradient of lse) that the score works on.
    """
    moved = seen if more else seen & (seen.sum(-1, keepdim=True) > 1)
    weighed = seen & (kept != 0)
    found = {
        "output": ~weighed.any(-1, keepdim=True),
        "dquery": ~moved.any(-1, keepdim=True),
        "dkey": _by_key_head(moved.sum(-2).unsqueeze(-1), group) == 0,
        "dvalue": _by_key_head(weighed.sum(-2).unsqueeze(-1), group) == 0,
    }
    if "bias" in x and x["bias"].is_floating_point():
        found["dbias"] = moved.int().sum_to_size(x["bias"].shape) == 0
    if "alibi_slopes" in x:
        found["dalibi_slopes"] = moved.sum((-2, -1)).sum_to_size(x["alibi_slopes"].shape) == 0
    return found


def _undecided(weights: Tensor, score: Tensor) -> Tensor:
    """Where scores so large that their errors exceed 1 leave open which key of a row has the weight: 1, else 0."""
    if weights.shape[-1] == 0:
        return weights
    top, at = weights.max(-1, keepdim=True)
    reach = torch.finfo(torch.float32).eps * (score + score.gather(-1, at))
    near = (reach > 1) & (top.log() - weights.log() < reach) & (top > 0)
    near = near.scatter(-1, at, False)
    return near.scatter(-1, at, near.any(-1, keepdim=True)).to(weights.dtype)


def _log_of_sum(weights: Tensor) -> Tensor:
    """log(sum(exp(score - largest score))) of each row, from the largest weight, which is the inverse of the sum."""
    if weights.shape[-1] == 0:
        return weights.sum(-1, keepdim=True)
    top = weights.amax(-1, keepdim=True)
    return -torch.log(torch.where(top > 0, top, 1.0))


def _by_key_head(t: Tensor, group: int) -> Tensor:
    """(B, Hkv, ...) of (B, H, ...): the sum over the query heads that share a key head."""
    return t.unflatten(1, (t.shape[1] // group, group)).sum(2)
