"""gelu, the gated units, rotary_embedding and both cross-entropies on a GPU: every number of 16 bits, every case, and
the same bits every time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from by_exponent import by_exponent, hold_by_row
from gated_forms import GATED_FORMS
from torchweld import backend, ops, reference
from torchweld.testing import Case, Oracle, cases

_REASON = backend.unavailable("cuda")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(_REASON is not None, reason=f"needs an NVIDIA GPU and torchweld._cuda: {_REASON}"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPS = ("gelu", "swiglu", "geglu", "rotary_embedding", "cross_entropy", "linear_cross_entropy")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for op in OPS for case in cases(op)], ids=lambda c: f"{c.op}: {c.name}")
def test_parity(case: Case, dtype: torch.dtype) -> None:
    Oracle(case, dtype, device="cuda").check()


def derived(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """A function's value and gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y.sum(), leaves)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_exponent(dtype: torch.dtype, approximate: str) -> None:
    x = by_exponent(dtype).cuda()
    ours, stock, definition = (partial(f, approximate=approximate) for f in (ops.gelu, functional.gelu, reference.gelu))
    with backend.strict():
        found = derived(ours, x)
    for name, got, its, right in zip(
        ("y", "dx"), found, derived(stock, x), derived(definition, x.double()), strict=True
    ):
        hold_by_row(got, its, right, name)


@pytest.mark.parametrize("form", GATED_FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_exponent_of_a_gate(dtype: torch.dtype, form: str) -> None:
    gate = by_exponent(dtype).cuda()
    up = torch.randn_like(gate, dtype=torch.float32).to(dtype)
    of = GATED_FORMS[form]
    with backend.strict():
        found = derived(of.ours, gate, up)
    theirs, exact = derived(of.torchs, gate, up), derived(of.definition, gate.double(), up.double())
    for name, got, its, right in zip(("y", "dgate", "dup"), found, theirs, exact, strict=True):
        hold_by_row(got, its, right, name)


def repeated(run: Callable[[], tuple[Tensor, ...]]) -> None:
    first = run()
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("classes", [10, 1000, 50257, 128256])
def test_the_same_bits_every_time(classes: int) -> None:
    logits, target = torch.randn(999, classes, device="cuda").bfloat16(), torch.randint(classes, (999,), device="cuda")
    loss = partial(ops.cross_entropy, target=target, reduction="none", label_smoothing=0.1)
    repeated(lambda: derived(loss, logits))


def test_the_same_bits_of_chunks_every_time() -> None:
    """Four chunks of rows, whose products are torch's own."""
    x, weight = torch.randn(4 * 1024, 256, device="cuda"), torch.randn(65536, 256, device="cuda") / 16
    target = torch.randint(65536, (4 * 1024,), device="cuda")
    repeated(lambda: derived(lambda x, w: ops.linear_cross_entropy(x, w, target), x.bfloat16(), weight.bfloat16()))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("seq_dim", [-2, -3])
def test_in_place_on_another_stream(seq_dim: int, interleaved: bool) -> None:
    """The kernel waits for what its stream has been given, and for nothing else."""
    shape = (2, 8, 515, 128) if seq_dim == -2 else (2, 515, 8, 128)
    options: dict[str, Any] = {"seq_dim": seq_dim, "interleaved": interleaved}
    query, key = (torch.randn(shape, device="cuda").bfloat16() for _ in range(2))
    expected = ops.rotary_embedding(query, key, **options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), backend.strict():
        late = query.clone(), key.clone()
        found = ops.rotary_embedding(*late, inplace=True, **options)
    torch.cuda.current_stream().wait_stream(stream)
    for before, after, right in zip(late, found, expected, strict=True):
        assert after is before and torch.equal(after, right)


@pytest.mark.slow
def test_more_than_two_billion_elements() -> None:
    rows, cols = 2**18 + 3, 2**13
    if torch.cuda.mem_get_info()[0] < 12 * rows * cols:
        pytest.skip("needs 26 GB of free GPU memory")
    packed = torch.randn(rows, 2 * cols, device="cuda", dtype=torch.bfloat16)
    with backend.strict():
        found = ops.swiglu(packed)
        turned = ops.rotary_embedding(packed.view(1, 1, rows, 2 * cols), rotary_dim=64)
    last = slice(-5, None)
    torch.testing.assert_close(found[last].float(), reference.swiglu(packed[last].float()), rtol=2**-8, atol=1e-5)
    places = torch.arange(rows, device="cuda")[last]
    heads = packed[last].view(1, 1, 5, 2 * cols).float()
    right = reference.rotary_embedding(heads, position_ids=places, rotary_dim=64)
    torch.testing.assert_close(turned[:, :, last].float(), right, rtol=2**-8, atol=1e-5)
