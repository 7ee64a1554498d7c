"""What the tests of elementwise functions share: numbers of every exponent, and the rule for each of these alone."""

from __future__ import annotations

import torch


def by_exponent(dtype: torch.dtype) -> torch.Tensor:
    """Numbers of one sign and exponent in a row: all of a 16-bit dtype, of float32 some of each row."""
    if dtype is not torch.float32:
        columns = 2 ** (10 if dtype is torch.float16 else 7)
        return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(-1, columns)
    mantissas = torch.randint(2**23, (512, 32), generator=torch.Generator().manual_seed(0))
    mantissas[:, :3] = torch.tensor([0, 1, 2**23 - 1])
    return (torch.arange(-256, 256)[:, None] * 2**23 + mantissas).to(torch.int32).view(dtype)


def hold_by_row(ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor, what: str) -> None:
    """The rule for each row on its own: a largest error over all would hide what is wrong with small numbers."""
    rounded = exact.to(ours.dtype).double()
    finite = rounded.isfinite()
    same = (ours.double() == rounded) | (ours.isnan() & rounded.isnan())
    assert torch.where(finite, ours.isfinite(), same).all(), what

    def largest(t: torch.Tensor) -> torch.Tensor:
        return torch.where(finite & t.isfinite(), t, 0).abs().amax(1)

    info = torch.finfo(ours.dtype)
    ulp = info.eps * 2.0 ** (largest(exact).clamp(min=info.tiny).frexp().exponent - 1).double()
    error, allowed = largest(ours.double() - exact), 2 * largest(theirs.double() - exact) + ulp
    row = int((error - allowed).argmax())
    assert (error <= allowed).all(), f"{what}: {error[row]:.3g} in row {row}, allowed {allowed[row]:.3g}"
