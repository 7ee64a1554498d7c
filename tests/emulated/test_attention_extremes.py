"""Scores far from zero in the CUDA kernels of attention, on the emulated GPU (tests/emulation).

What is right is the definition in float64; how far off a result may be, torch's own operations in float32 say.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_cases import gradients
from torchweld import ops, reference

LEAST = torch.finfo(torch.float32).min
OFFSETS = (-100.0, -1e4, -1e9, -1e10, -1e20, -1e30, -1e38, LEAST)

# On both families of kernels, sm80 and sm90. float32 has kernels in sm80 only.
KERNELS = [(80, torch.float32), (80, torch.bfloat16), (90, torch.bfloat16), (90, torch.float16)]


@pytest.fixture(params=KERNELS, ids=lambda k: f"sm_{k[0]}-{k[1]}")
def dtype(request: pytest.FixtureRequest, emulated: ModuleType) -> torch.dtype:
    capability, dtype = request.param
    emulated.set_machine(capability=capability)
    assert isinstance(dtype, torch.dtype)
    return dtype


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, sinks: Tensor | None = None) -> Tensor:
    """Attention by torch's own operations."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    return scores.softmax(-1)[..., : k.shape[-2]] @ v


def check(n: int, ours: Tensor, theirs: Tensor, want: Tensor, rounding: float = 1e-6) -> None:
    """The error is at most twice that of `theirs`, which is float32, plus the rounding of the dtype."""
    assert ours.isfinite().all(), n
    rounding += 4 * torch.finfo(ours.dtype).eps * want.abs().max().item()
    limit = 2 * (theirs - want).abs().max() + rounding
    assert (ours - want).abs().max() <= limit, (n, (ours - want).abs().max(), limit)


def hold(function: Callable[..., Any], exact: Callable[..., Tensor], leaves: list[Tensor], first: int = 0) -> None:
    """The output and the gradients. Those of queries and keys begin at column `first`."""
    dtype = leaves[0].dtype
    dout = normal(*leaves[0].shape[:-1], leaves[2].shape[-1], seed=9).to(dtype)
    found = gradients(function, leaves, dout)
    single = gradients(exact, [t.float() for t in leaves], dout.float())
    double = gradients(exact, [t.double() for t in leaves], dout.double())
    # The gradient of a sink as probable as a key is computed from rounded outputs.
    sinks = torch.finfo(dtype).eps * (dout * double[0]).abs().sum().item() / leaves[1].shape[-2]
    for n, tensors in enumerate(zip(found, single, double, strict=True)):
        found_, single_, double_ = (t[..., first if n in (1, 2) else 0 :] for t in tensors)
        check(n, found_, single_, double_, rounding=sinks if n == 4 else 1e-6)


def bias_of(rows: int, keys: int, seen: Callable[[int], slice]) -> Tensor:
    """A bias whose rows alternate between the offsets: the offset at masked keys, 0 at visible keys."""
    bias = torch.tensor([OFFSETS[i % len(OFFSETS)] for i in range(rows)]).unsqueeze(1).repeat(1, keys)
    for i in range(rows):
        bias[i, seen(i)] = 0.0
    return bias.view(1, 1, rows, keys)


# Every kernel has several tiles. The first row of each offset sees keys from the second or third tile on only.
ROWS, KEYS = 24, 200
MASKS = {
    "left padding": lambda i: slice(150, KEYS),
    "right padding": lambda i: slice(0, 30),
    "blocks": lambda i: slice(8 * i, 8 * i + 8),
    "one key": lambda i: slice(170, 171),
    "a row without keys": lambda i: slice(0, 0),
}


@pytest.mark.parametrize("mask", MASKS)
def test_finite_masks(mask: str, dtype: torch.dtype) -> None:
    """A finite bias is a number: a row where every key has the same bias has the probabilities of bias 0."""
    q, k, v = (normal(1, 1, n, 64, seed=n).to(dtype) for n in (ROWS, KEYS, KEYS))
    bias = bias_of(ROWS, KEYS, MASKS[mask])
    hold(lambda *t: ops.attention(*t, bias=bias), lambda q, k, v: naive(q, k, v, bias.to(q.dtype)), [q, k, v])


def test_a_row_of_the_least_value_is_a_mean(dtype: torch.dtype) -> None:
    q, k, v = (normal(1, 1, n, 64, seed=n).to(dtype) for n in (20, KEYS, KEYS))
    out, dq, dk, dv = gradients(
        lambda *t: ops.attention(*t, bias=torch.full((1, 1, 20, KEYS), LEAST)), [q, k, v], torch.ones_like(q)
    )
    step = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(out, v.mean(-2, keepdim=True).expand_as(out), rtol=0, atol=step)
    torch.testing.assert_close(dv, torch.full_like(dv, 20 / KEYS), rtol=step, atol=0)
    assert dq.isfinite().all() and dk.isfinite().all()


@pytest.mark.parametrize("offset", [300.0, 8e4, 8e6, 8e9, 1e20])
def test_large_logits(offset: float, dtype: torch.dtype) -> None:
    """A common offset of a row's scores changes nothing, from a column of query and key or from a bias.

    All products are exact, so that no rounding of a score hides what is lost after it.
    """
    q, k, v = (normal(1, 1, n, 64, seed=n).mul(2).round().clamp(-2, 2).to(dtype) for n in (ROWS, 150, 150))
    bias = torch.full((1, 1, ROWS, 150), offset)
    bias[..., ::3] = -offset
    hold(lambda *t: ops.attention(*t, bias=bias), lambda q, k, v: naive(q, k, v, bias.to(q.dtype)), [q, k, v])
    if offset < 1e8:  # what float16 can make of two columns; their own gradients are large terms that cancel
        root = 2.0 ** round(torch.tensor(8 * offset).log2().item() / 2)
        q[..., :2], k[..., 0], k[..., 1] = root, root, torch.arange(150) % 4
        hold(ops.attention, naive, [q, k, v], first=2)


@pytest.mark.parametrize("sink", [0.0, 1e5, -1e5])
@pytest.mark.parametrize("offset", [0.0, 1e5, -1e5])
def test_sinks_beside_large_logits(offset: float, sink: float, dtype: torch.dtype) -> None:
    q, k, v = (normal(1, 1, n, 64, seed=n).to(dtype) for n in (20, 100, 100))
    bias, sinks = torch.full((1, 1, 20, 100), offset), torch.tensor([sink])
    hold(
        lambda q, k, v, sinks: ops.attention(q, k, v, bias=bias, sinks=sinks),
        lambda q, k, v, sinks: naive(q, k, v, bias.to(q.dtype), sinks),
        [q, k, v, sinks],
    )


# ---- A probability of 1: nothing changes it, so queries and keys have zero gradients

ONE_KEY: dict[str, tuple[int, int, dict[str, Any]]] = {
    "there is one": (70, 1, {}),
    "the first row, causal": (1, 90, {"causal": True}),
    "a window of one": (70, 70, {"window": (0, 0)}),
    "one is left by a mask": (20, 90, {"bias": torch.arange(90) == 77}),
    "one is left by a bias": (20, 90, {"bias": torch.where(torch.arange(90) == 77, 0.0, -1e9)}),
    "one is much larger": (20, 90, {"bias": torch.where(torch.arange(90) == 3, 500.0, 0.0)}),
    "capped": (70, 1, {"softcap": 2.0}),
    "ALiBi": (70, 1, {"alibi_slopes": torch.tensor([0.5, 3.0])}),
    "dropped": (70, 1, {"dropout_p": 0.3, "seed": torch.tensor([3])}),
    "a sink far below": (70, 1, {"sinks": torch.full((2,), -1e4)}),
}


@pytest.mark.parametrize("deterministic", [True, False], ids=["ordered", "atomics"])
@pytest.mark.parametrize("name", ONE_KEY)
def test_one_key_has_no_gradient(name: str, deterministic: bool, dtype: torch.dtype) -> None:
    queries, keys, flags = ONE_KEY[name]
    q, k, v = (normal(1, 2, n, 64, seed=n).to(dtype) for n in (queries, keys, keys))
    dout = normal(1, 2, queries, 64, seed=5).to(dtype)
    _, dq, dk, dv = gradients(lambda *t: ops.attention(*t, deterministic=deterministic, **flags), [q, k, v], dout)
    assert not dq.any() and not dk.any() and dv.any()


def test_one_key_and_its_logarithm(dtype: torch.dtype) -> None:
    """The gradient of the score is that of lse; the output adds nothing."""
    q, k, v = (normal(1, 1, n, 64, seed=n).to(dtype).requires_grad_() for n in (20, 1, 1))
    out, lse = ops.attention(q, k, v, return_lse=True)
    dq, dk = torch.autograd.grad(out.sum() + lse.sum(), [q, k])
    torch.testing.assert_close(dq, (k / 8).expand_as(dq).detach())
    torch.testing.assert_close(dk, q.float().sum(-2, keepdim=True).div(8).to(dtype).detach())


def test_packed_sequences_of_one_key(dtype: torch.dtype) -> None:
    """Beside a row of large logits."""
    starts = torch.tensor([0, 1, 41, 42], dtype=torch.int32)
    q, k, v = (normal(42, 1, 64, seed=n).to(dtype) for n in range(3))
    q[1:41], k[1:41] = q[1:41] * 0 + 128, (normal(40, 1, 64).round() / 4 + 128).to(dtype)
    dout = normal(42, 1, 64, seed=5).to(dtype)
    call: dict[str, Any] = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
    out, dq, dk, dv = gradients(lambda *t: ops.attention(*t, **call), [q, k, v], dout)
    for one in (0, 41):
        torch.testing.assert_close(out[one], v[one], rtol=2**-20 if dtype == torch.float32 else 0, atol=0)
        assert not dq[one].any() and not dk[one].any()
    exact = gradients(lambda *t: reference.attention(*t, **call), [t.double() for t in (q, k, v)], dout.double())
    for got, want in zip((out, dv), (exact[0], exact[3]), strict=True):
        torch.testing.assert_close(
            got.double(), want, rtol=0, atol=4 * torch.finfo(dtype).eps * want.abs().max().item()
        )


# ---- Decoding


@pytest.mark.parametrize("keys", [100, 700], ids=["one split", "three splits"])
@pytest.mark.parametrize("offset", OFFSETS[1::2])
def test_decoding(offset: float, keys: int, dtype: torch.dtype) -> None:
    """All keys but the last have the offset; all have it; one split has it."""
    q, k, v = (normal(3, 1, n, 64, seed=n).to(dtype) for n in (1, keys, keys))
    bias = torch.full((3, 1, 1, keys), offset)
    bias[0, ..., -5:] = bias[1, ..., :40] = 0.0
    found = ops.attention(q, k, v, bias=bias)
    want = naive(q.double(), k.double(), v.double(), bias.double())
    assert isinstance(found, Tensor)
    check(0, found, naive(q.float(), k.float(), v.float(), bias), want)


@pytest.mark.parametrize("keys", [100, 700], ids=["one split", "three splits"])
def test_decoding_large_logits(keys: int, dtype: torch.dtype) -> None:
    """Scores of 2^20 with small differences, and a sink as large. Also with a paged cache."""
    q, k, v = (normal(1, 1, n, 64, seed=n).mul(2).round().clamp(-2, 2).to(dtype) for n in (1, keys, keys))
    q[..., 0], k[..., 0] = 4096.0, 2048.0
    sinks = torch.tensor([2.0**20])
    want = naive(q.double(), k.double(), v.double(), sinks=sinks.double())
    atol = 4 * torch.finfo(dtype).eps * v.abs().max().item()
    found: Any = ops.attention(q, k, v, sinks=sinks)
    torch.testing.assert_close(found.double(), want, rtol=0, atol=atol)
    cache = [
        torch.zeros(-(-keys // 16) * 16, 64, dtype=dtype).index_copy_(0, torch.arange(keys), t[0, 0]) for t in (k, v)
    ]
    blocks = [t.view(-1, 16, 1, 64) for t in cache]
    table = torch.arange(blocks[0].shape[0], dtype=torch.int32).unsqueeze(0)
    lengths = torch.tensor([keys], dtype=torch.int32)
    paged: Any = ops.paged_attention(*(q, *blocks, table, lengths), sinks=sinks)
    torch.testing.assert_close(paged.double(), want, rtol=0, atol=atol)


def test_lse_is_that_of_the_definition(dtype: torch.dtype) -> None:
    q, k, v = (normal(1, 1, n, 64, seed=n).to(dtype) for n in (ROWS, KEYS, KEYS))
    bias = bias_of(ROWS, KEYS, MASKS["left padding"])
    _, lse = ops.attention(q, k, v, bias=bias, return_lse=True)
    _, want = reference.attention(q.double(), k.double(), v.double(), bias=bias.double(), return_lse=True)
    torch.testing.assert_close(lse, want.float(), rtol=1e-6, atol=1e-5)
