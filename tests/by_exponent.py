"""What the tests of elementwise functions share: numbers of every exponent, and the rule for each of these alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from torchweld import ops, reference


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


def hold_gelu(dtype: torch.dtype, approximate: str, backends: Iterable[str]) -> None:
    """Output and gradient of every number of 16 bits, and of float32 every exponent: subnormals, zeros, infinities and
    NaN among them. Each of `backends`, when it is reached, is the one that serves."""
    x = by_exponent(dtype)

    def run(function: Callable[..., torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaf = x.detach().requires_grad_()
        y = function(leaf, approximate=approximate)
        return y.detach(), *torch.autograd.grad(y.sum(), leaf)

    theirs, exact = run(torch.nn.functional.gelu, x), run(reference.gelu, x.double())
    for backend in backends:
        for name, ours, its, right in zip(("y", "dx"), run(ops.gelu, x), theirs, exact, strict=True):
            hold_by_row(ours, its, right, f"{name} on {backend}")
