"""The one rule of exactness: no further from float64 than twice what torch is in the same dtype, plus one ulp.

    max|ours - fp64|  <=  2 * max|torch in the same dtype - fp64|  +  tiny

It needs no constant that somebody tuned, and holds for every op, size and dtype. `tiny` is one ulp, in the output's
dtype, of the largest output: the room that two correct roundings of one number need. Three kinds of output need more
care, because there torch's error or the output's scale says nothing about what a correct kernel does:

Few elements. The largest of a handful of rounding errors is a matter of luck, and torch's may be 0. So is that of many
elements where one of them, or one row, is far larger than the others. The limit itself does not change: `Oracle` judges
a small case over several draws of its inputs as if they were one tensor, and one that misses over more draws, those
that missed among them. A fault stays the largest error of all draws; only the estimate of torch's error gets better.

Outputs near cancellation. Where the result is a difference of terms far larger than itself (dx of a layer norm over
two columns, dquery where one key takes all the weight), an ulp of the result means nothing. There the case gives
`terms`, by element or for all: what the rounding of every operation adds up to by first-order analysis, in units of the
relative error of one. tiny grows by eps times the largest, eps being that of the arithmetic, which is float32 for
everything narrower; it is a sum, as the result is rounded once more after what it is made of. A term counts as far as
its rounding reaches the output: a score of 1e4 whose key has all the weight reaches nothing, and gives no room. An
additive mask is never a term: what its rounding costs is in torch's error, which adds the same mask.

Exact zeros. Where the definition is 0 for every input (the softmax of one visible key is 1, so its score has no
gradient; a key that no query sees; a row without a target), the case says so by `zeros`. These elements are a tensor of
their own, with their own error of torch's and their own terms: the other elements lend them nothing. Where nothing is
summed at all (their term is 0) only 0 is right, whatever torch has.

Numbers below the least normal one of the arithmetic count as 0: kernels may lose them.

What is not finite is no matter of distance: infinities and NaNs must stand exactly where float64, rounded to the
output's dtype, has them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Parity:
    """One tensor's verdict. `problem` says what is wrong in one line; None where the rule holds."""

    tensor: str
    error: float
    torch_error: float
    allowed: float
    problem: str | None = None

    @property
    def ratio(self) -> float:
        """The error as a share of what is allowed; infinite where the result is wrong in kind."""
        if self.problem is not None and self.error <= self.allowed:
            return math.inf
        if self.allowed == 0:
            return math.inf if self.error else 0.0
        return self.error / self.allowed


def _ulp(scale: float, dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    return math.ldexp(info.eps, math.frexp(max(scale, info.tiny))[1] - 1)


def _index(flat: int, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), shape))


def _largest(values: Tensor, where: Tensor) -> float:
    return float(torch.where(where, values, 0).amax())


def parity(
    tensor: str,
    ours: Tensor,
    theirs: Tensor,
    exact: Tensor,
    terms: Tensor | float = 0.0,
    zeros: Tensor | bool = False,
) -> Parity:
    """Judges `ours` by the rule above.

    `theirs` is torch's in the same dtype, `exact` the definition's in float64. `terms` and `zeros` (True where the
    definition is 0) are those of the rule, and broadcast to the output.
    """
    for what, expected, got in (("shape", exact.shape, ours.shape), ("dtype", theirs.dtype, ours.dtype)):
        if expected != got:
            return Parity(tensor, math.inf, 0.0, 0.0, f"expected {what} {expected}, but got {got}")
    if ours.numel() == 0:
        return Parity(tensor, 0.0, 0.0, _ulp(0.0, ours.dtype))

    terms, zeros = (torch.as_tensor(t, device=ours.device).expand(ours.shape) for t in (terms, zeros))
    zeros = zeros & exact.isfinite()
    exact = torch.where(zeros, 0.0, exact)
    wide, rounded = ours.double(), exact.to(ours.dtype).double()
    finite = rounded.isfinite()
    misplaced = torch.where(finite, ~wide.isfinite(), ~((wide == rounded) | (wide.isnan() & rounded.isnan())))
    if bool(misplaced.any()):
        at = _index(int(misplaced.flatten().int().argmax()), ours.shape)
        count = int(misplaced.sum())
        problem = f"{count} values wrong in kind, the first at {list(at)}: {float(ours[at])} for {float(exact[at]):.6g}"
        return Parity(tensor, math.inf, 0.0, 0.0, problem)

    distance = torch.where(finite, wide - exact, 0).abs()
    torch_distance = torch.where(finite & theirs.isfinite(), theirs.double() - exact, 0).abs()
    arithmetic = torch.finfo(torch.promote_types(ours.dtype, torch.float32))

    def verdict(group: Tensor, torch_counts: bool = True) -> Parity:
        """On the elements of `group`; of the largest error where all of them hold the rule."""
        error = _largest(distance, group)
        torch_error = _largest(torch_distance, group) if torch_counts else 0.0
        term = _largest(terms, group)
        tiny = _ulp(_largest(exact.abs(), group & finite), ours.dtype) + arithmetic.tiny if torch_counts else 0.0
        tiny += arithmetic.eps * term
        allowed, problem = 2 * torch_error + tiny, None
        if error > allowed:
            at = _index(int(torch.where(group, distance, -1.0).argmax()), ours.shape)
            problem = (
                f"max|ours - fp64| = {error:.3g} at {list(at)} ({float(ours[at]):.8g} for {float(exact[at]):.8g}), "
                f"allowed {allowed:.3g}: 2 x torch's {torch_error:.3g} + {tiny:.3g}"
            )
        return Parity(tensor, error, torch_error, allowed, problem)

    verdicts = [verdict(~zeros)]
    if bool(zeros.any()):
        verdicts += [verdict(zeros & (terms != 0)), verdict(zeros & (terms == 0), torch_counts=False)]
    return next((v for v in verdicts if v.problem is not None), verdicts[0])


def judge(
    ours: dict[str, Tensor],
    theirs: dict[str, Tensor],
    exact: dict[str, Tensor],
    terms: Mapping[str, Tensor | float] | None = None,
    zeros: dict[str, Tensor] | None = None,
) -> list[Parity]:
    """The verdicts on all tensors of one call, by name."""
    if ours.keys() != exact.keys():
        raise AssertionError(f"expected the tensors {list(exact)}, but got {list(ours)}")
    terms, zeros = terms or {}, zeros or {}
    return [parity(n, t, theirs[n], exact[n], terms.get(n, 0.0), zeros.get(n, False)) for n, t in ours.items()]


def confirm(verdicts: list[Parity], op: str, case: str) -> list[Parity]:
    """The same verdicts; raises AssertionError, naming op, case and tensors, if one misses the rule."""
    wrong = [f"{v.tensor}: {v.problem}" for v in verdicts if v.problem is not None]
    if wrong:
        raise AssertionError(f"[{op}] case {case!r}, " + "; ".join(wrong))
    return verdicts


def assert_parity(
    ours: dict[str, Tensor],
    theirs: dict[str, Tensor],
    exact: dict[str, Tensor],
    *,
    op: str,
    case: str,
    terms: Mapping[str, Tensor | float] | None = None,
    zeros: dict[str, Tensor] | None = None,
) -> list[Parity]:
    """Holds named tensors to the rule: `judge`, then `confirm`."""
    return confirm(judge(ours, theirs, exact, terms, zeros), op, case)
