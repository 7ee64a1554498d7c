"""linear_cross_entropy: exact by the one rule, the same bits always, and never all logits in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fresh
from leaves import gradient
from thread_counts import hold_bits
from torchweld import backend, nn, ops, reference
from torchweld.ops import _linear_cross_entropy as chunks
from torchweld.testing import Case, Oracle, cases

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "none", "label_smoothing": 0.1},
    {"reduction": "sum", "softcap": 2.0, "z_loss": 1e-2},
]


def tensors(rows: int, features: int, classes: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """input, weight, target with a row that has none, bias."""
    shapes = ((rows, features), (classes, features), (classes,))
    x, w, b = ((torch.randn(shape) / shape[-1] ** 0.25).to(dtype).requires_grad_() for shape in shapes)
    target = torch.randint(classes, (rows,))
    target[rows // 2] = -100
    return [x, w, target, b]


def results(function: Callable[..., Tensor], args: list[Tensor], **options: Any) -> list[Tensor]:
    loss = function(*args, **options)
    wanted = [t for t in args if t.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss.sum(), wanted)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases("linear_cross_entropy"), ids=lambda c: c.name)
def test_parity(case: Case, dtype: torch.dtype, each_isa: Iterator[str]) -> None:
    """Loss and gradients, on every instruction set of this CPU."""
    oracle = Oracle(case, dtype)
    for _ in each_isa:
        oracle.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_threads(dtype: torch.dtype, isa: str) -> None:
    args = tensors(1050, 40, 1300, dtype)
    hold_bits(lambda: results(ops.linear_cross_entropy, args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_chunk_rounds_nothing_that_the_next_needs(dtype: torch.dtype) -> None:
    """What the rows of a later chunk take back of the weight's gradient leaves no more than one rounding."""
    x, w, target, _ = tensors(512, 24, 80, dtype)
    target[target == -100] = 3
    twice = [torch.cat([x, -x]).detach().requires_grad_(), torch.zeros_like(w).requires_grad_(), target.repeat(2)]
    dweight = results(ops.linear_cross_entropy, twice, reduction="sum")[2]
    assert dweight.abs().max() <= 2**-14 * results(ops.linear_cross_entropy, [x, w, target], reduction="sum")[2].max()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 3])
def test_no_row_counts(rows: int, reduction: str, bias: bool) -> None:
    """As torch: the mean of nothing is NaN, and its gradient none."""
    x, w, _, b = tensors(max(rows, 1), 4, 5)
    args = [x.detach()[:rows].requires_grad_(), w, torch.full((rows,), -100)] + [b] * bias

    def stock(x: Tensor, w: Tensor, t: Tensor, b: Tensor | None = None, **options: Any) -> Tensor:
        return F.cross_entropy(F.linear(x, w, b), t, **options)

    found, expected = (results(f, args, reduction=reduction) for f in (ops.linear_cross_entropy, stock))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_rows_without_a_target_are_not_read(name: str) -> None:
    x, w, target, b = tensors(600, 9, 70)
    target[::3] = -100
    expected = results(ops.linear_cross_entropy, [x, w, target, b])
    poisoned = x.detach().clone()
    poisoned[::3] = torch.nan
    with backend.use_backend(name):
        found = results(ops.linear_cross_entropy, [poisoned.requires_grad_(), w, target, b])
    torch.testing.assert_close(found, expected)
    assert not found[1][::3].any()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_shift_is_the_next_position(options: dict[str, Any]) -> None:
    x, w, target, b = tensors(24, 8, 40)
    x, target = x.detach().view(2, 3, 4, 8).requires_grad_(), target.view(2, 3, 4)
    found = results(ops.linear_cross_entropy, [x, w, target, b], shift=True, **options)
    expected = ops.linear_cross_entropy(x[..., :-1, :], w, target[..., 1:], b, **options)
    torch.testing.assert_close(found, [expected.detach(), *torch.autograd.grad(expected.sum(), (x, w, b))])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_way_to_ask_for_the_gradient(reduction: str) -> None:
    """Twice, of a multiple, of some of the tensors, accumulated into what is there."""
    x, w, target, b = tensors(20, 8, 40)
    loss = ops.linear_cross_entropy(x, w, target, b, reduction=reduction).sum()
    first = torch.autograd.grad(loss, (x, w, b), retain_graph=True)
    kept = [g.clone() for g in first]
    for g in torch.autograd.grad(loss, (x, w, b), retain_graph=True):
        g.zero_()  # what a caller does with a gradient is nothing to the next
    torch.testing.assert_close(torch.autograd.grad(3 * loss, w, retain_graph=True)[0], 3 * kept[1])
    loss.backward(retain_graph=True)
    loss.backward()
    for leaf, expected in zip((x, w, b), kept, strict=True):
        torch.testing.assert_close(gradient(leaf), 2 * expected)


def test_a_loss_scale_keeps_small_gradients_in_float16() -> None:
    torch.manual_seed(0)
    x, weight, target = torch.randn(2000, 24), torch.randn(40, 24) * 1e-3, torch.randint(40, (2000,))
    found = []
    for dtype, loss_of in ((torch.float64, reference.linear_cross_entropy), (torch.float32, ops.linear_cross_entropy)):
        a, w = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.float16, enabled=dtype is torch.float32):
            loss = loss_of(a, w, target)
        found.append(torch.autograd.grad(2.0**16 * loss, (a, w)))
    for exact, ours in zip(*found, strict=True):
        assert float((ours - exact).norm() / exact.norm()) < 2e-3


def test_fake_tensors_have_gradients() -> None:
    with FakeTensorMode():
        x, w, target, b = tensors(20, 8, 40)
        ops.linear_cross_entropy(x, w, target, b).backward()
        assert [t.grad is not None and t.grad.shape == t.shape for t in (x, w, b)] == [True] * 3


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)], ids=str)
def test_dtypes_are_promoted(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x, w, target, b = tensors(20, 8, 40)
    x, w, b = (t.detach().to(dtypes[t is not x]).requires_grad_() for t in (x, w, b))
    loss = ops.linear_cross_entropy(x, w, target, b)
    assert loss.dtype is torch.float32
    assert [g.dtype for g in torch.autograd.grad(loss, (x, w, b))] == [t.dtype for t in (x, w, b)]
    exact = ops.linear_cross_entropy(x.double(), w.double(), target, b.double())
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_of_gradients(options: dict[str, Any]) -> None:
    args = [t.double().detach() if t.is_floating_point() else t for t in tensors(4, 3, 6)]
    leaves = [args[0].requires_grad_(), args[1].requires_grad_(), args[3].requires_grad_()]
    call = lambda x, w, b: ops.linear_cross_entropy(x, w, args[2], b, **options)  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves) and torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.slow
def test_torch_knows_the_op() -> None:
    x, w, target, b = (t.detach() for t in tensors(5, 8, 33))
    op = torch.ops.torchweld.linear_cross_entropy.default
    for bias, dloss, wanted in ((None, None, [False] * 3), (b, torch.rand(5), [True] * 3)):
        torch.library.opcheck(op, (x, w, bias, target, -100, 0.1, 2.0, 1e-3, dloss, *wanted))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_double_backward(options: dict[str, Any]) -> None:
    def second(args: list[Tensor]) -> tuple[Tensor, ...]:
        wanted = [args[0], args[1], args[3]]
        loss = ops.linear_cross_entropy(*args, **options).sum()
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        return torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), wanted)

    args = tensors(7, 6, 9)
    wide = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in args]
    for found, expected in zip(second(args), second(wide), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_by_chunks_of_torchs_products(
    options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What serves a GPU is the kernel's result, whatever a chunk holds."""
    x, w, target, b = (t.detach() for t in tensors(70, 12, 50, dtype))
    smoothing, softcap, z_loss = (options.get(n) or 0.0 for n in ("label_smoothing", "softcap", "z_loss"))
    settings = chunks.LossOptions(-100, smoothing, softcap, z_loss)
    for rows, wanted in ((70, [True] * 3), (9, [True] * 3), (9, [False, True, False]), (1, [True, False, True])):
        monkeypatch.setattr(chunks, "_CHUNK_ELEMENTS", rows * 50)
        call: list[Any] = [x, w, b.float(), target, settings, torch.rand(70), chunks.Wanted(*wanted)]
        found, expected = chunks.by_chunks(*call), chunks.op(*call)
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            rounding = 8 * torch.finfo(dtype).eps * max(1.0, theirs.abs().max().item() if theirs.numel() else 0.0)
            torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=rounding)
        call[-2:] = None, chunks.NOTHING
        assert not any(g.numel() for g in chunks.by_chunks(*call)[1:])


@pytest.mark.parametrize("compiled", [False, True])
def test_a_target_that_is_no_class_touches_no_memory(compiled: bool) -> None:
    x, w, _, _ = tensors(3, 4, 5)
    function = torch.compile(ops.linear_cross_entropy, backend="aot_eager") if compiled else ops.linear_cross_entropy
    for bad in (5, -1, 2**40):
        with pytest.raises(IndexError, match=rf"expected classes in \[0, 5\) .*, but got {bad} in row 1"):
            function(x, w, torch.tensor([0, bad, 2]))


X, W, T, B = torch.ones(3, 4), torch.ones(5, 4), torch.zeros(3, dtype=torch.int64), torch.ones(5)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((X, W, T[:2]), {}, ValueError, r"target: expected shape \[3\], but got \[2\]"),
        ((X, W, T.int()), {}, RuntimeError, r"target: expected dtype torch\.int64"),
        ((X, W, X.sum(1)), {}, RuntimeError, r"target: expected classes .*class probabilities are for cross_entropy"),
        ((X, W, T.to("meta")), {}, RuntimeError, r"target: expected device cpu, but got meta"),
        ((X, W.T, T), {}, RuntimeError, r"input: expected shape \[\.\.\., 5\], as weight has it, but got \[3, 4\]"),
        ((X, B, T), {}, RuntimeError, r"weight: expected shape \[classes, features\] with a class, but got \[5\]"),
        ((X, W[:0], T), {}, RuntimeError, r"weight: expected shape \[classes, features\] with a class"),
        ((X, W, T, B[:4]), {}, RuntimeError, r"bias: expected shape \[5\], but got \[4\]"),
        ((X.long(), W, T), {}, TypeError, r"input: expected a floating-point dtype, but got torch\.int64"),
        ((X[0], W, T[0]), {"shift": True}, RuntimeError, r"input: expected shape \[\.\.\., positions, features\]"),
        ((X, W, T), {"reduction": "max"}, ValueError, r"reduction: expected 'mean', 'sum' or 'none'"),
        ((X, W, T), {"label_smoothing": 1.5}, RuntimeError, r"label_smoothing: expected a number in"),
        ((X, W, T), {"softcap": 0.0}, ValueError, r"softcap: expected a finite number above 0, or None, but got 0\.0"),
        ((X, W, T), {"z_loss": -1.0}, ValueError, r"z_loss: expected a finite number of at least 0, but got -1\.0"),
        ((X, W, T), {"shift": "yes"}, TypeError, r"shift: expected a bool, but got 'yes'"),
        ((X, W, T), {"ignore_index": None}, TypeError, r"ignore_index: expected an integer, but got None"),
        ((X, [1.0], T), {}, TypeError, r"weight: expected a torch\.Tensor, but got list"),
    ],
)
def test_bad_input_is_named(args: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^\[linear_cross_entropy\] {message}"):
        ops.linear_cross_entropy(*args, **options)


def test_float64_runs_on_the_definition() -> None:
    args = [t.double() if t.is_floating_point() else t for t in tensors(5, 4, 7)]
    assert torch.equal(ops.linear_cross_entropy(*args), reference.linear_cross_entropy(*args))


PROGRAM = """
import resource, torch
from torchweld import ops
rows, features, classes = 2048, 32, 16384
x, w = torch.randn(rows, features, requires_grad=True), torch.randn(classes, features, requires_grad=True)
target = torch.randint(classes, (rows,))
def step(rows):
    ops.linear_cross_entropy(x[:rows], w, target[:rows]).backward()
step(8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(rows)
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / (4 * rows * classes))
"""


@pytest.mark.slow
def test_the_logits_are_never_whole_in_memory() -> None:
    """The step takes less than half of what the logits alone would; torch takes three times these."""
    done = fresh.python(PROGRAM)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.5


# ---- nn.LinearCrossEntropy


@pytest.mark.parametrize("bias", [False, True])
def test_the_module_has_the_weight_of_a_head(bias: bool) -> None:
    head = torch.nn.Linear(8, 40, bias=bias)
    criterion = nn.LinearCrossEntropy(head, label_smoothing=0.1, ignore_index=3)
    x, target = torch.randn(20, 8), torch.randint(40, (20,))
    loss = criterion(x, target)
    expected = F.cross_entropy(head(x), target, label_smoothing=0.1, ignore_index=3)
    torch.testing.assert_close(loss, expected)
    grads = torch.autograd.grad(loss, list(head.parameters()))
    torch.testing.assert_close(grads, torch.autograd.grad(expected, list(head.parameters())))
    assert not list(criterion.parameters()) and not criterion.state_dict()
    assert repr(criterion) == "LinearCrossEntropy(8 to 40, reduction=mean)"


def test_the_module_follows_a_copy_of_its_model() -> None:
    model = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(40, 8)})
    model["loss"] = nn.LinearCrossEntropy(model["embedding"], shift=True, softcap=30.0)  # type: ignore[arg-type]
    twin: Any = copy.deepcopy(model)
    assert twin["loss"].head is twin["embedding"] is not model["embedding"]
    assert list(twin.state_dict()) == ["embedding.weight"]
    assert twin["loss"](torch.randn(2, 5, 8), torch.randint(40, (2, 5))).isfinite()


def test_the_module_refuses_what_is_no_head() -> None:
    with pytest.raises(TypeError, match=r"^\[LinearCrossEntropy\] head: expected a torch\.nn\.Linear .* but got GELU$"):
        nn.LinearCrossEntropy(torch.nn.GELU())  # type: ignore[arg-type]


def test_a_bias_gradient_beyond_float32_is_infinite(isa: str) -> None:
    """What its additions lose is then no number, and is left out."""
    rows, classes = 40, 4
    x, weight, bias = torch.zeros(rows, 3), torch.zeros(classes, 3), torch.zeros(classes, requires_grad=True)
    target = torch.zeros(rows, dtype=torch.long)
    doutput = torch.full((rows,), 3e38)
    theirs = F.cross_entropy(F.linear(x, weight, bias), target, reduction="none")
    ours = ops.linear_cross_entropy(x, weight, target, bias, reduction="none")
    expected, found = (torch.autograd.grad(loss, bias, doutput)[0] for loss in (theirs, ours))
    assert expected.isinf().all()
    assert torch.equal(found, expected)
