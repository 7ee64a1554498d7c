"""The attention kernels on wgmma (csrc/cuda/attention/sm90), on the emulated GPU."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from attention_cases import MODIFIERS, TILES, case, hold_dropout, hold_packed
from torchweld import ops
from torchweld.testing import Case, Oracle
from torchweld.testing.attention import AttentionCase
from torchweld.testing.case import evaluate

SIXTEEN = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def kernels(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A Hopper GPU, whose shared memory these kernels need in full."""
    monkeypatch.setattr(sys.modules[Case.__module__], "_DRAWS", 1)  # products are slow here
    emulated.set_machine(capability=90)
    return emulated


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("each", TILES, ids=lambda c: c.name)
def test_tiles(each: AttentionCase, dtype: torch.dtype) -> None:
    Oracle(each, dtype).check()


@pytest.mark.parametrize("each", MODIFIERS, ids=lambda c: c.name)
def test_modifiers(each: AttentionCase) -> None:
    Oracle(each, torch.bfloat16).check()


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_tiles_of_three_warpgroups(kernels: ModuleType, causal: bool, dtype: torch.dtype) -> None:
    """Three warpgroups give the same bits as two, which run where a multiprocessor has no second tile to compute."""
    each = case("380 queries are two tiles of 192, or three of 128", 380, 500, heads=1, lse=True, causal=causal)
    x = each.inputs(dtype)
    found = []
    for multiprocessors, seed in ((1, 0), (4, 0), (1, 1)):
        kernels.set_machine(capability=90, multiprocessors=multiprocessors, seed=seed)
        found.append(evaluate(each, each.ours, x))
    kernels.set_machine(capability=90, multiprocessors=1)
    Oracle(each, dtype).check()
    for other in found[1:]:
        assert all(torch.equal(other[name], found[0][name]) for name in other)


def test_these_are_the_kernels_that_run(kernels: ModuleType) -> None:
    """A block of sm90 needs more shared memory than any block of sm80."""
    q = torch.randn(1, 1, 20, 64).bfloat16().requires_grad_()
    out = ops.attention(q, q, q)
    assert isinstance(out, Tensor)
    kernels.set_machine(capability=90, shared_bytes_per_block=64 * 1024)
    with pytest.raises(RuntimeError, match=r"\[attention_forward\] CUDA"):
        ops.attention(q, q, q)
    with pytest.raises(RuntimeError, match=r"\[attention_backward\] CUDA"):
        torch.autograd.grad(out.sum(), q)
    kernels.set_machine(capability=80, shared_bytes_per_block=64 * 1024)
    out = ops.attention(q, q, q)
    assert isinstance(out, torch.Tensor)
    torch.autograd.grad(out.sum(), q)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_dropout_is_that_of_the_definition(dim: int) -> None:
    hold_dropout(1, 70, 150, dim, torch.bfloat16)


@pytest.mark.parametrize("flags", [{}, {"softcap": 5.0, "dropout_p": 0.2}], ids=["plain", "capped, dropped"])
def test_packed_sequences(flags: dict[str, float]) -> None:
    """One sequence is empty, one has no keys, one has one query."""
    hold_packed([0, 130, 130, 135, 136], [0, 90, 151, 151, 200], 64, torch.bfloat16, **flags)


@pytest.mark.parametrize("each", [TILES[0], TILES[4], TILES[6], TILES[10]], ids=lambda c: c.name)
def test_the_order_of_threads_does_not_show(kernels: ModuleType, each: AttentionCase) -> None:
    x = each.inputs(torch.bfloat16)
    first = evaluate(each, each.ours, x)
    for seed in (1, 2, 3, 4):
        kernels.set_machine(capability=90, seed=seed)
        for name, found in evaluate(each, each.ours, x).items():
            assert torch.equal(found, first[name]), name
