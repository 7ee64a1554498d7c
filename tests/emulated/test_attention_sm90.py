"""The attention kernels on wgmma (csrc/cuda/attention/sm90), on the emulated GPU."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_cases import MODIFIERS, TILES, case, gradients
from torchweld import ops, reference
from torchweld.testing import Case, Oracle
from torchweld.testing.attention import AttentionCase
from torchweld.testing.cases import evaluate

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
    """The forward and both backward kernels see the same mask, on every GPU."""
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(1, 2, n, dim).bfloat16() for n in (70, 150, 150, 70))
    options: dict[str, Any] = {
        "dropout_p": 0.3,
        "seed": torch.tensor([-5_000_000_019]),
        "causal": True,
        "causal_align": "bottom_right",
    }
    found = gradients(lambda *t: ops.attention(*t, **options), [q, k, v], dout)
    wide = [t.double() for t in (q, k, v)]
    exact = gradients(lambda *t: reference.attention(*t, **options), wide, dout.double())
    for got, want in zip(found, exact, strict=True):
        step = 4 * torch.finfo(torch.bfloat16).eps * want.abs().max()
        assert (got.double() - want).abs().max() <= step + 1e-5


@pytest.mark.parametrize("flags", [{}, {"softcap": 5.0, "dropout_p": 0.2}], ids=["plain", "capped, dropped"])
def test_packed_sequences(flags: dict[str, float]) -> None:
    """One sequence is empty, one has no keys, one has one query. The memory after a sequence is NaN and never read."""
    torch.manual_seed(1)
    lens_q, lens_k = (torch.tensor(n, dtype=torch.int32) for n in ([0, 130, 130, 135, 136], [0, 90, 151, 151, 200]))
    q, k, v, dout = (torch.randn(n, h, 64).bfloat16() for n, h in ((136, 4), (200, 2), (200, 2), (136, 4)))
    k[90:151] = v[90:151] = float("nan")  # of the sequence without queries
    sinks = torch.randn(4)

    def call(module: ModuleType, *tensors: Tensor) -> Tensor:
        out = module.attention(
            *tensors[:3], causal=True, causal_align="bottom_right", sinks=tensors[3], seed=torch.tensor([7]),
            cu_seqlens_q=lens_q, cu_seqlens_k=lens_k, **flags,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    leaves = [q, k, v, sinks]
    found = gradients(lambda *t: call(ops, *t), leaves, dout)
    clean = [torch.nan_to_num(t).double() for t in leaves]
    exact = gradients(lambda *t: call(reference, *t), clean, dout.double())
    for name, got, want in zip(["out", "dq", "dk", "dv", "dsinks"], found, exact, strict=True):
        step = 4 * torch.finfo(torch.bfloat16).eps * want.abs().max()
        assert (got.double() - want).abs().max() <= step + 2e-5, name


@pytest.mark.parametrize("each", [TILES[0], TILES[4], TILES[6], TILES[10]], ids=lambda c: c.name)
def test_the_order_of_threads_does_not_show(kernels: ModuleType, each: AttentionCase) -> None:
    x = each.inputs(torch.bfloat16)
    first = evaluate(each, each.ours, x)
    for seed in (1, 2, 3, 4):
        kernels.set_machine(capability=90, seed=seed)
        for name, found in evaluate(each, each.ours, x).items():
            assert torch.equal(found, first[name]), name
