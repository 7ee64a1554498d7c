"""gelu and cross_entropy on a GPU: every number of 16 bits, every case, and the same bits every time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from by_exponent import by_exponent, hold_by_row
from torchweld import backend, ops, reference
from torchweld.testing import Case, Oracle, cases

_REASON = backend.unavailable("cuda")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(_REASON is not None, reason=f"needs an NVIDIA GPU and torchweld._cuda: {_REASON}"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*cases("gelu"), *cases("cross_entropy")], ids=lambda c: f"{c.op}: {c.name}")
def test_parity(case: Case, dtype: torch.dtype) -> None:
    Oracle(case, dtype, device="cuda").check()


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_exponent(dtype: torch.dtype, approximate: str) -> None:
    x = by_exponent(dtype).cuda()

    def run(function: Callable[..., torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaf = x.detach().requires_grad_()
        y = function(leaf, approximate=approximate)
        return y.detach(), *torch.autograd.grad(y.sum(), leaf)

    theirs, exact = run(torch.nn.functional.gelu, x), run(reference.gelu, x.double())
    with backend.strict():
        found = run(ops.gelu, x)
    for name, ours, its, right in zip(("y", "dx"), found, theirs, exact, strict=True):
        hold_by_row(ours, its, right, name)


@pytest.mark.parametrize("classes", [10, 1000, 50257, 128256])
def test_the_same_bits_every_time(classes: int) -> None:
    logits, target = torch.randn(999, classes, device="cuda").bfloat16(), torch.randint(classes, (999,), device="cuda")

    def run() -> tuple[torch.Tensor, ...]:
        leaf = logits.detach().requires_grad_()
        loss = ops.cross_entropy(leaf, target, reduction="none", label_smoothing=0.1)
        return loss.detach(), *torch.autograd.grad(loss.sum(), leaf)

    first = run()
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
