"""attention(deterministic=False): backward_keys accumulates dquery by atomics. On the emulated GPU."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from torchweld import ops, reference
from torchweld.testing import Case, Oracle
from torchweld.testing.attention import AttentionCase

SIXTEEN = (torch.bfloat16, torch.float16)


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def gpu(emulated: ModuleType, request: pytest.FixtureRequest) -> ModuleType:
    emulated.set_machine(capability=request.param)
    return emulated


@pytest.fixture
def kernels(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """torch poisons memory under use_deterministic_algorithms; the op is told that this is off."""
    monkeypatch.setattr(sys.modules[Case.__module__], "_DRAWS", 1)  # products are slow here
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    return gpu


def case(regime: str, queries: int, keys: int, **flags: object) -> AttentionCase:
    flags |= {"name": regime, "regime": regime, "deterministic": False}
    return AttentionCase(queries=queries, keys=keys, **flags)  # type: ignore[arg-type]


CASES = [
    case("D 24: two tiles of keys, rows of 64 bytes", 70, 130, dim=24, heads=1, causal=True, bottom_right=True),
    case("D 64, an odd number of tiles", 150, 150, heads=1, causal=True, bottom_right=True),
    case("D 64, GQA 4:2, a bias that learns", 40, 90, heads=4, kv_heads=2, bias=(1, 1, 40, 90)),
    case("D 128", 75, 150, dim=128, heads=1, causal=True),
    case("D 98 and 101, element by element", 20, 75, dim=98, value_dim=101, heads=1),
    case("D 33: a row of sums begins on two floats", 20, 75, dim=33, heads=1, merged=True, batch=2),
    case("D 128, capped, sinks, lse", 40, 70, dim=128, heads=1, softcap=3.0, sinks=True, lse=True),
    case("D 256: values in a loop of their own", 37, 70, dim=256, heads=1, window=(20, 3)),
    case("D 200, dropout", 20, 70, dim=200, heads=1, dropout=0.3),
    case("rows that see nothing", 100, 40, heads=1, causal=True, bottom_right=True),
    case("no keys", 3, 0, heads=1),
]


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("each", CASES, ids=lambda c: c.name)
def test_parity(each: AttentionCase, dtype: torch.dtype, kernels: ModuleType) -> None:
    Oracle(each, dtype).check()


@pytest.mark.parametrize("each", [CASES[1], CASES[3]], ids=lambda c: c.name)
@pytest.mark.parametrize("gpu", [90], indirect=True)
def test_hopper_under_other_schedules(each: AttentionCase, kernels: ModuleType) -> None:
    for seed in (1, 2, 3):
        kernels.set_machine(capability=90, seed=seed)
        Oracle(each, torch.bfloat16).check()


@pytest.mark.parametrize("wanted", ["query, key", "query, value", "query", "key, value"])
@pytest.mark.parametrize("dim", [64, 256])
def test_any_of_the_gradients(dim: int, wanted: str, kernels: ModuleType) -> None:
    qkv = [torch.randn(1, 2, n, dim).bfloat16() for n in (40, 70, 70)]
    found = []
    for module, tensors in ((ops, qkv), (reference, [t.double() for t in qkv])):
        x = dict(zip(("query", "key", "value"), tensors, strict=True))
        leaves = [x[n].requires_grad_() for n in wanted.split(", ")]
        out = module.attention(**x, deterministic=False)
        assert isinstance(out, Tensor)
        found.append(torch.autograd.grad(out.sum(), leaves))
    for got, want in zip(*found, strict=True):
        assert (got.double() - want).abs().max() <= 4 * 2**-8 * want.abs().max() + 1e-5


def test_packed_sequences(kernels: ModuleType) -> None:
    starts = [torch.tensor(n, dtype=torch.int32) for n in ([0, 70, 70, 75, 76], [0, 40, 51, 51, 100])]
    qkv = [torch.randn(n, h, 32).bfloat16() for n, h in ((76, 4), (100, 2), (100, 2))]
    found = []
    for module, tensors in ((ops, qkv), (reference, [t.double() for t in qkv])):
        leaves = [t.requires_grad_() for t in tensors]
        options = {"cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1], "dropout_p": 0.2, "seed": torch.tensor([7])}
        out = module.attention(*leaves, **options, causal=True, causal_align="bottom_right", deterministic=False)
        assert isinstance(out, Tensor)
        found.append(torch.autograd.grad(out.sum(), leaves))
    for got, want in zip(*found, strict=True):
        assert (got.double() - want).abs().max() <= 4 * 2**-8 * want.abs().max() + 1e-5


def gradients(x: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in x]
    out = ops.attention(*leaves, **options)
    assert isinstance(out, Tensor)
    return torch.autograd.grad(out.square().sum(), leaves)


def test_asked_for_and_overruled(gpu: ModuleType) -> None:
    """Atomics add in another order than one loop. Where much cancels, the bits show which kernel has run."""
    x = [torch.randn(1, 2, n, 64).half() for n in (40, 300, 300)]
    x[1] += 20.0  # moves all scores of a query alike, and dquery not at all
    settled = gradients(x)
    assert all(torch.equal(a, b) for a, b in zip(gradients(x, deterministic=True), settled, strict=True))
    assert not torch.equal(gradients(x, deterministic=False)[0], settled[0])
    torch.use_deterministic_algorithms(True)
    try:
        assert all(torch.equal(a, b) for a, b in zip(gradients(x, deterministic=False), settled, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("learns", ["float32", "slopes"])
def test_where_it_changes_nothing(learns: str, emulated: ModuleType) -> None:
    x = [torch.randn(1, 2, n, 32) for n in (40, 150, 150)]
    x = x if learns == "float32" else [t.bfloat16() for t in x]
    found = []
    for deterministic in (True, False):
        slopes = torch.rand(2, requires_grad=learns == "slopes", generator=torch.Generator().manual_seed(1))
        found.append(gradients(x, alibi_slopes=slopes, deterministic=deterministic))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_block_fits_the_shared_memory_of_every_gpu(kernels: ModuleType) -> None:
    """GPUs of capability 8.6 and 8.9 have the least: 99 KB."""
    kernels.set_machine(shared_bytes_per_block=99 * 1024)
    for dim in (64, 128, 256):
        for softcap in (0.0, 1.0):
            gradients(3 * [torch.randn(1, 1, 20, dim).bfloat16()], softcap=softcap, deterministic=False)


def test_on_the_cpu_it_changes_nothing() -> None:
    x = [torch.randn(2, 3, n, 32) for n in (40, 150, 150)]
    for got, want in zip(gradients(x, deterministic=False), gradients(x), strict=True):
        assert torch.equal(got, want)


def test_compiles_to_one_graph() -> None:
    x = [torch.randn(1, 2, 20, 16, requires_grad=True) for _ in range(3)]
    compiled = torch.compile(ops.attention, fullgraph=True, backend="aot_eager")
    out = compiled(*x, deterministic=False)
    assert isinstance(out, torch.Tensor)
    (got,) = torch.autograd.grad(out.square().sum(), x[0])
    torch.testing.assert_close(got, gradients(x)[0])
