"""The CUDA kernels of cross_entropy on the emulated GPU (tests/emulation): rows of every length and alignment; and
linear_cross_entropy, which takes them between torch's products.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from extreme_logits import each_logits, hold_to_torch
from torchweld import ops, reference
from torchweld.ops import _linear_cross_entropy as chunks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN = float("nan")
IGNORED = -100


def poisoned(like: Tensor, offset: int = 0) -> Tensor:
    """A matrix of this shape and dtype, full of NaN, that begins `offset` elements after a multiple of 16 bytes."""
    return torch.full((like.numel() + 8,), NAN, dtype=like.dtype)[offset:][: like.numel()].view(like.shape)


def run(
    module: ModuleType, logits: Tensor, target: Tensor, dloss: Tensor, smoothing: float = 0.0, offset: int = 0
) -> tuple[Tensor, Tensor]:
    """Losses and gradient of the logits, by the kernels alone. The gradient begins at `offset`."""
    rows = logits.shape[0]
    loss, stats, dlogits = torch.full((rows,), NAN), torch.full((2, rows), NAN), poisoned(logits, offset)
    module.cross_entropy_forward(logits, target, IGNORED, smoothing, loss, stats)
    module.cross_entropy_backward(dloss, logits, target, IGNORED, smoothing, stats, dlogits)
    return loss, dlogits


def check(module: ModuleType, logits: Tensor, target: Tensor, smoothing: float = 0.0, offset: int = 0) -> None:
    dloss = torch.randn(logits.shape[0])
    loss, dlogits = run(module, logits, target, dloss, smoothing, offset)
    leaf = logits.double().requires_grad_()
    exact = F.cross_entropy(leaf, target, ignore_index=IGNORED, reduction="none", label_smoothing=smoothing)
    exact.backward(dloss.double())
    eps = torch.finfo(logits.dtype).eps
    torch.testing.assert_close(loss.double(), exact.detach(), rtol=1e-6, atol=2e-6)
    assert leaf.grad is not None
    torch.testing.assert_close(dlogits.double(), leaf.grad, rtol=eps, atol=min(eps, 1e-6))


# Lanes of less than a warp; a warp; several warps; the most lanes and batches of vectors; two tiles of the backward.
CLASSES = (1, 2, 7, 8, 9, 31, 64, 100, 255, 256, 257, 1023, 1024, 1030, 4099, 8200, 16400)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
def test_classes(emulated: ModuleType, classes: int, dtype: torch.dtype) -> None:
    rows = 5 if classes > 256 else 70
    logits = (2 * torch.randn(rows, classes)).to(dtype)
    target = torch.randint(classes, (rows,))
    target[1] = IGNORED
    check(emulated, logits, target)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("begin", "offset"), [(1, 1), (3, 3), (1, 0), (0, 3)])
def test_where_a_row_begins(emulated: ModuleType, begin: int, offset: int, dtype: torch.dtype) -> None:
    """Logits and gradient as far from a multiple of 16 bytes as each other, or not."""
    for classes in (3, 50, 1001, 4100):
        whole = torch.full((5 * classes + begin + 8,), NAN, dtype=dtype)
        logits = whole[begin : begin + 5 * classes].view(5, classes)
        logits.copy_(torch.randn(5, classes))
        check(emulated, logits, torch.tensor([0, classes - 1, IGNORED, 1, classes // 2]), 0.1, offset)


@pytest.mark.parametrize("rows", [1, 2, 33, 300])
@pytest.mark.parametrize("classes", [5, 100])
def test_rows(emulated: ModuleType, rows: int, classes: int) -> None:
    check(emulated, torch.randn(rows, classes), torch.randint(classes, (rows,)))


@pytest.mark.parametrize("classes", [100, 5000])
@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_smoothing(emulated: ModuleType, smoothing: float, classes: int) -> None:
    logits = torch.randn(4, classes)
    check(emulated, logits + 1e4, torch.tensor([0, 1, IGNORED, classes - 1]), smoothing)
    check(emulated, logits.bfloat16(), torch.tensor([0, 1, IGNORED, classes - 1]), smoothing)


@pytest.mark.parametrize("classes", [20, 700, 9000])
def test_order_of_threads_does_not_show(emulated: ModuleType, classes: int) -> None:
    logits, target, dloss = torch.randn(7, classes).bfloat16(), torch.randint(classes, (7,)), torch.randn(7)
    first = run(emulated, logits, target, dloss, 0.1)
    for seed in (1, 2, 3):
        emulated.set_machine(seed=seed)
        assert all(torch.equal(a, b) for a, b in zip(first, run(emulated, logits, target, dloss, 0.1), strict=True))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("classes", [3, 600])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@each_logits
def test_logits_far_out(logits: list[float], smoothing: float, classes: int) -> None:
    hold_to_torch(logits, smoothing, classes)


@pytest.mark.usefixtures("emulated")
def test_the_rows_maximum_comes_last() -> None:
    """The sum is rescaled at every step of a lane."""
    for logits in (torch.linspace(-300, 300, 20000), torch.linspace(300, -300, 20000)):
        exact = F.cross_entropy(logits.double()[None], torch.tensor([5]))
        found = ops.cross_entropy(logits[None], torch.tensor([5]))
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [5, -1, 2**40])
def test_a_target_that_is_no_class_ends_the_kernel(emulated: ModuleType, bad: int) -> None:
    """As torch's assertion on a GPU. No memory is read at such a target."""
    target = torch.tensor([0, bad, 2])
    with pytest.raises(RuntimeError, match="cross_entropy: expected 0 <= target && target < classes"):
        run(emulated, torch.randn(3, 5), target, torch.ones(3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 7, 50, 1001, 4100])
def test_gradient_in_the_place_of_the_logits(emulated: ModuleType, classes: int, dtype: torch.dtype) -> None:
    for begin in (0, 1, 3):
        logits = poisoned(torch.empty(5, classes, dtype=dtype), begin).copy_(torch.randn(5, classes))
        target, dloss = torch.tensor([0, classes - 1, IGNORED, 0, classes // 2]), torch.randn(5)
        loss, expected = run(emulated, logits, target, dloss, 0.1, begin)
        stats = torch.full((2, 5), NAN)
        emulated.cross_entropy_forward(logits, target, IGNORED, 0.1, loss, stats)
        emulated.cross_entropy_backward(dloss, logits, target, IGNORED, 0.1, stats, logits)
        assert torch.equal(logits, expected)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 9, 70])
@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.1, "reduction": "sum"}, {"reduction": "none"}, {"softcap": 2.0}, {"z_loss": 0.01}],
    ids=str,
)
def test_linear_cross_entropy_by_chunks(
    options: dict[str, Any], rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of one row, of some with a shorter one at the end, and of all: torch's products and these kernels."""
    classes = 53
    monkeypatch.setattr(chunks, "_CHUNK_ELEMENTS", rows * classes)
    x, weight, bias = (torch.randn(shape) / 2 for shape in ((70, 12), (classes, 12), (classes,)))
    target = torch.randint(classes, (70,))
    target[::5] = IGNORED
    x[0] = NAN  # it has no target
    for biased in (False, True):
        found: list[Tensor] = []
        exact: list[Tensor] = []
        for function, kind, into in (
            (ops.linear_cross_entropy, dtype, found),
            (reference.linear_cross_entropy, torch.float64, exact),
        ):
            leaves = [t.to(dtype).to(kind).requires_grad_() for t in (x, weight, bias)[: 2 + biased]]
            loss = function(leaves[0], leaves[1], target, *leaves[2:], **options)
            into += [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]
        for ours, right in zip(found, exact, strict=True):
            assert ours.dtype is dtype
            rounding = 16 * torch.finfo(dtype).eps * float(right.abs().max())
            torch.testing.assert_close(ours.double(), right, rtol=0, atol=rounding)
