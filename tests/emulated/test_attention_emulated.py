"""The CUDA kernels of attention on the emulated GPU (tests/emulation): every path through them."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_cases import MODIFIERS, case, hold_dropout, hold_packed
from torchweld import ops, reference
from torchweld.testing import Case, Oracle, assert_parity
from torchweld.testing.attention import AttentionCase
from torchweld.testing.case import evaluate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def kernels(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys.modules[Case.__module__], "_DRAWS", 1)  # products are slow here
    return emulated


# By instance: head size and type. Two tiles of own rows and several streamed tiles, each with missing rows.
SIZES = [
    (case("D 24: rows of 64 bytes, padded", 130, 37, dim=24, heads=1, causal=True, bottom_right=True), DTYPES[1:]),
    (case("D 64", 150, 80, heads=1, causal=True, bottom_right=True), DTYPES),
    (case("D 128", 70, 75, dim=128, heads=1, causal=True), DTYPES),
    (case("D 100, element by element", 20, 75, dim=98, value_dim=101, heads=1), DTYPES),
    (case("D 256: one gradient at a time", 70, 37, dim=256, heads=1, causal=True), DTYPES),
    (case("D 200, capped", 20, 37, dim=200, heads=1, softcap=2.0), DTYPES),
]


@pytest.mark.parametrize(
    ("each", "dtype"), [(c, t) for c, dtypes in SIZES for t in dtypes], ids=lambda x: getattr(x, "name", str(x))
)
def test_sizes(each: AttentionCase, dtype: torch.dtype) -> None:
    Oracle(each, dtype).check()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("each", MODIFIERS, ids=lambda c: c.name)
def test_modifiers(each: AttentionCase, dtype: torch.dtype) -> None:
    Oracle(each, dtype).check()


DECODING = [
    case("one split, padded", 1, 17, dim=40),
    case("an empty cache", 1, 0),
    case("three splits, GQA 8:1, element by element", 1, 700, heads=8, kv_heads=1, dim=39),
    case("16 rows", 4, 300, heads=8, kv_heads=2, batch=2, causal=True, bottom_right=True, merged=True),
    case("a window that leaves splits empty", 3, 900, causal=True, bottom_right=True, window=(100, None), dim=128),
    case("rows that see nothing", 4, 2, causal=True, bottom_right=True, lse=True),
    case("D 256", 2, 300, dim=256, heads=1, lse=True),
    case("everything", 2, 600, heads=4, kv_heads=2, causal=True, bottom_right=True, window=(500, None), softcap=3.0,
         bias=(1, 4, 2, 600), alibi=True, sinks=True, lse=True),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("each", DECODING, ids=lambda c: c.name)
def test_decoding(each: AttentionCase, dtype: torch.dtype) -> None:
    x = {n: t for n, t in each.inputs(dtype).items() if n not in ("doutput", "dlse")}
    wider = {n: t.double() if t.is_floating_point() else t for n, t in x.items()}
    with torch.no_grad():
        ours, theirs, exact = each.ours(x), each.torch(x), each.reference(wider)
    terms = each.terms({**wider, "doutput": exact["output"]}) if each.keys else {}
    assert_parity(ours, theirs, exact, op="attention", case=each.name, terms=terms)


def test_an_unwritten_cache_is_masked() -> None:
    q, k, v = torch.randn(2, 4, 1, 32), torch.randn(2, 2, 300, 32), torch.randn(2, 2, 300, 32)
    out = ops.attention(q, k, v, bias=torch.arange(300) < 77)
    assert isinstance(out, Tensor)
    torch.testing.assert_close(out, reference.attention(q, k[:, :, :77], v[:, :, :77]))


# ---- Dropout, packed sequences


@pytest.mark.parametrize(("dim", "dtype"), [(64, torch.bfloat16), (64, torch.float32), (256, torch.float16)], ids=str)
def test_dropout_is_that_of_the_definition(dim: int, dtype: torch.dtype) -> None:
    hold_dropout(2, 37, 70, dim, dtype)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_of_nothing_and_of_all(p: float) -> None:
    q = torch.randn(1, 1, 20, 32).requires_grad_()
    out: Any = ops.attention(q, q, q, dropout_p=p)
    grad = torch.autograd.grad(out.square().sum(), q)[0]
    if p == 1.0:
        assert not out.any() and not grad.any()
    else:
        torch.testing.assert_close(out, reference.attention(q, q, q))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_packed_sequences(dropout_p: float, dtype: torch.dtype) -> None:
    """One sequence is empty, one has no keys, one has one query."""
    hold_packed([0, 70, 70, 75, 76], [0, 40, 51, 51, 100], 32, dtype, softcap=5.0, dropout_p=dropout_p)


# ---- The machine


@pytest.mark.parametrize("each", [SIZES[1][0], MODIFIERS[1], MODIFIERS[4]], ids=lambda c: c.name)
def test_the_order_of_threads_does_not_show(kernels: ModuleType, each: AttentionCase) -> None:
    x = each.inputs(torch.bfloat16)
    first = evaluate(each, each.ours, x)
    for seed in (1, 2):
        kernels.set_machine(seed=seed)
        for name, found in evaluate(each, each.ours, x).items():
            assert torch.equal(found, first[name]), name


def test_a_block_fits_the_shared_memory_of_every_gpu(kernels: ModuleType) -> None:
    """GPUs of capability 8.6 and 8.9 have the least: 99 KB."""
    kernels.set_machine(shared_bytes_per_block=99 * 1024)
    for dtype, dim in ((torch.bfloat16, 128), (torch.bfloat16, 256), (torch.float32, 128), (torch.float32, 256)):
        q = torch.randn(1, 1, 20, dim).to(dtype).requires_grad_()
        for softcap in (0.0, 1.0):
            out: Any = ops.attention(q, q, q, softcap=softcap)
            torch.autograd.grad(out.sum(), q)
        ops.attention(q[:, :, :1].detach(), q.detach(), q.detach())


def test_too_large_a_head_is_refused() -> None:
    q = torch.randn(1, 1, 2, 257)
    with pytest.raises(ValueError, match=r"\[attention_forward\] query, value: .* at most 256, but got 257"):
        ops.attention(q, q, q)
