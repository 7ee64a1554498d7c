"""The one rule of exactness: no further from float64 than twice what torch is in the same dtype, plus one ulp.

    max|ours - fp64|  <=  2 * max|torch in the same dtype - fp64|  +  tiny

It needs no constant that somebody tuned, and holds for every op, size and dtype. `tiny` is one ulp, in the output's
dtype, of the largest output: the room that two correct roundings of one number need. Where the result is a difference
of terms far larger than itself (dx of a layer norm over one column is rstd * (g - g): exactly 0), an ulp of the result
means nothing; there the caller gives `terms`, the size of what cancels, and tiny is at least one ulp of that in the
dtype of the arithmetic, which is float32 for everything narrower.

What is not finite is no matter of distance: infinities and NaNs must stand exactly where float64, rounded to the
output's dtype, has them.
"""

from __future__ import annotations

import math
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
        return self.error / self.allowed


def _ulp(scale: float, dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    return math.ldexp(info.eps, math.frexp(max(scale, info.tiny))[1] - 1)


def _index(flat: int, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), shape))


def parity(tensor: str, ours: Tensor, theirs: Tensor, exact: Tensor, terms: float = 0.0) -> Parity:
    """Judges `ours` by the rule above; `theirs` is torch's in the same dtype, `exact` the definition's in float64."""
    for what, expected, got in (("shape", exact.shape, ours.shape), ("dtype", theirs.dtype, ours.dtype)):
        if expected != got:
            return Parity(tensor, math.inf, 0.0, 0.0, f"expected {what} {expected}, but got {got}")
    if ours.numel() == 0:
        return Parity(tensor, 0.0, 0.0, _ulp(0.0, ours.dtype))

    wide, rounded = ours.double(), exact.to(ours.dtype).double()
    finite = rounded.isfinite()
    scale = float(torch.where(finite, exact, 0).abs().amax())
    tiny = max(_ulp(scale, ours.dtype), _ulp(terms, torch.promote_types(ours.dtype, torch.float32)) if terms else 0.0)
    distance = torch.where(finite & wide.isfinite(), wide - exact, 0).abs()
    torch_distance = torch.where(finite & theirs.isfinite(), theirs.double() - exact, 0).abs()
    error, torch_error = float(distance.amax()), float(torch_distance.amax())
    allowed = 2 * torch_error + tiny

    problem = None
    misplaced = torch.where(finite, ~wide.isfinite(), ~((wide == rounded) | (wide.isnan() & rounded.isnan())))
    if bool(misplaced.any()):
        flat = int(misplaced.flatten().int().argmax())
        at = _index(flat, ours.shape)
        count = int(misplaced.sum())
        problem = f"{count} values wrong in kind, the first at {list(at)}: {float(ours[at])} for {float(exact[at]):.6g}"
    elif error > allowed:
        at = _index(int(distance.argmax()), ours.shape)
        problem = (
            f"max|ours - fp64| = {error:.3g} at {list(at)} ({float(ours[at]):.8g} for {float(exact[at]):.8g}), "
            f"allowed {allowed:.3g}: 2 x torch's {torch_error:.3g} + {tiny:.3g}"
        )
    return Parity(tensor, error, torch_error, allowed, problem)


def judge(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], exact: dict[str, Tensor], terms: dict[str, float] | None = None
) -> list[Parity]:
    """The verdicts on all tensors of one call, by name."""
    if ours.keys() != exact.keys():
        raise AssertionError(f"expected the tensors {list(exact)}, but got {list(ours)}")
    return [parity(n, t, theirs[n], exact[n], (terms or {}).get(n, 0.0)) for n, t in ours.items()]


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
    terms: dict[str, float] | None = None,
) -> list[Parity]:
    """Holds named tensors to the rule: `judge`, then `confirm`."""
    return confirm(judge(ours, theirs, exact, terms), op, case)
