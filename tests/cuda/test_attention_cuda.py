"""attention on a GPU: every case, the same bits every time, streams, graphs, and tensors beyond 2^31 elements."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_cases import TILES
from torchweld import backend, ops, reference
from torchweld.testing import Case, Oracle, confirm
from torchweld.testing.attention import ATTENTION, AttentionCase
from torchweld.testing.case import evaluate
from torchweld.testing.paged_attention import PAGED_ATTENTION

_REASON = backend.unavailable("cuda")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(_REASON is not None, reason=f"needs an NVIDIA GPU and torchweld._cuda: {_REASON}"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def only_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a call would fall back to the reference."""
    monkeypatch.setattr(backend._settings, "strict", True)
    monkeypatch.setattr(backend._settings, "loaded", True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", (*ATTENTION, *TILES, *PAGED_ATTENTION), ids=lambda case: f"{case.op}: {case.name}")
def test_parity(case: Case, dtype: torch.dtype) -> None:
    Oracle(case, dtype, "cuda").check()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", (*ATTENTION, *TILES), ids=lambda case: case.name)
def test_parity_by_atomics(case: AttentionCase, dtype: torch.dtype) -> None:
    oracle = Oracle(replace(case, deterministic=False), dtype, "cuda")
    confirm(oracle.judge(poison=False), case.op, case.name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 4, 1000, 64), (2, 4, 1000, 128), (2, 4, 1000, 256), (4, 16, 1152, 64)],
    ids=["D 64", "D 128", "D 256", "enough tiles of 192 for any Hopper"],
)  # fmt: skip
@pytest.mark.parametrize("deterministic", [True, False])
def test_long_sequences(deterministic: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(shape, device="cuda").to(dtype).requires_grad_() for _ in range(4))
    out = ops.attention(q, k, v, causal=True, deterministic=deterministic)
    assert isinstance(out, Tensor)
    found = [out, *torch.autograd.grad(out, (q, k, v), dout)]
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    exact_out = reference.attention(*wide, causal=True)
    assert isinstance(exact_out, Tensor)
    for got, want in zip(found, [exact_out, *torch.autograd.grad(exact_out, wide, dout.double())], strict=True):
        assert (got.double() - want).abs().max() <= 4 * torch.finfo(dtype).eps * want.abs().max() + 1e-5


@pytest.mark.parametrize(
    "case", [*(c for c in ATTENTION if "causal" in c.name or "bias" in c.name), *TILES], ids=lambda c: c.name
)
def test_same_bits_every_time(case: Case) -> None:
    x = case.inputs(torch.bfloat16, "cuda")
    first = evaluate(case, case.ours, x)
    for _ in range(50):
        for name, again in evaluate(case, case.ours, x).items():
            assert torch.equal(again, first[name]), name


def test_dropout_is_that_of_the_cpu() -> None:
    q, k = torch.randn(2, 4, 100, 64), torch.randn(2, 4, 130, 64)
    eye = torch.eye(130).expand(2, 4, 130, 130)
    options: dict[str, Any] = {"dropout_p": 0.4, "seed": torch.tensor([1234567890123])}
    here: Any = ops.attention(q, k, eye, **options)
    there: Any = ops.attention(q.cuda(), k.cuda(), eye.cuda(), **options | {"seed": options["seed"].cuda()})
    assert torch.equal(here == 0, there.cpu() == 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("queries", "keys", "dim"), [(1, 32768, 128), (2, 5000, 64), (4, 777, 256), (1, 1, 40)])
def test_decoding(queries: int, keys: int, dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, n, dim, device="cuda").to(dtype) for h, n in ((8, queries), (2, keys), (2, keys)))
    out = ops.attention(q, k, v, causal=True, causal_align="bottom_right")
    want = reference.attention(q.double(), k.double(), v.double(), causal=True, causal_align="bottom_right")
    assert isinstance(out, Tensor) and isinstance(want, Tensor)
    assert (out.double() - want).abs().max() <= 2 * torch.finfo(dtype).eps * want.abs().max() + 1e-6


def test_in_a_graph() -> None:
    q = torch.randn(1, 2, 200, 64, device="cuda", dtype=torch.bfloat16)
    ops.attention(q, q, q, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.attention(q, q, q, causal=True)
    q.normal_()
    graph.replay()
    torch.testing.assert_close(out, ops.attention(q, q, q, causal=True), rtol=0, atol=0)


def test_a_cache_that_grows_under_a_graph() -> None:
    """The host reads neither the table nor the lengths."""
    q = torch.randn(2, 8, 1, 64, device="cuda", dtype=torch.bfloat16)
    cache = torch.randn(2, 40, 16, 2, 64, device="cuda", dtype=torch.bfloat16)
    table = torch.randperm(40, device="cuda").int().view(2, 20)
    lengths = torch.tensor([100, 7], dtype=torch.int32, device="cuda")
    arguments = (q, cache[0], cache[1], table, lengths)
    ops.paged_attention(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.paged_attention(*arguments)
    for _ in range(3):
        lengths += 37
        graph.replay()
        torch.testing.assert_close(out, ops.paged_attention(*arguments), rtol=0, atol=0)


def test_more_than_2_to_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB of free GPU memory")
    q = torch.zeros(3, 1, 1 << 23, 128, device="cuda", dtype=torch.bfloat16)
    q[-1, 0, -64:] = torch.randn(64, 128, device="cuda")
    window: dict[str, Any] = {"window": (63, 0)}
    out: Any = ops.attention(q, q, q, **window)
    tail = q[-1:, :, -128:]
    last: Any = ops.attention(tail, tail, tail, **window)
    assert torch.equal(out[-1, 0, -64:], last[0, 0, -64:])
    assert not out[0].any() and out[-1, 0, -1].any()
