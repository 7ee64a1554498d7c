"""Attention over sequences spread over processes, beside the definition on one process, by the rule of exactness."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import torchweld
from gloo_processes import in_processes, needs_gloo
from torchweld import ops
from torchweld.testing.attention_case import AttentionCase
from torchweld.testing.attention_packed import PackedAttentionCase
from torchweld.testing.case import Oracle, Tensors

pytestmark = [needs_gloo, pytest.mark.slow]


def case(name: str, rows: int = 256, **flags: Any) -> AttentionCase:
    return AttentionCase(name=name, regime="", queries=rows, keys=rows, **{"dim": 16, **flags})


def packed(name: str, *lengths: int, **flags: Any) -> PackedAttentionCase:
    total, pairs = sum(lengths), tuple((n, n) for n in lengths)
    return PackedAttentionCase(name=name, regime="", queries=total, keys=total, lengths=pairs, dim=16, **flags)


PLAIN = case("causal", causal=True)
CASES = [
    PLAIN,
    case("all keys", 96),
    case("GQA", 160, causal=True, heads=4, kv_heads=2, batch=2, value_dim=24),
    case("a window of a few keys", causal=True, window=(16, None), lse=True),
    case("a window of more than a chunk", causal=True, window=(90, None), alibi=True),
    case("both sides", 192, window=(70, 30), softcap=5.0, logits=20.0),
    case("ALiBi", 160, alibi=True, causal=True, heads=4),
    case("ALiBi, both sides", 96, alibi=True),
    case("sinks", sinks=True, causal=True, lse=True),
    case("merged", causal=True, merged=True, batch=2, lse=True),
    case("large scores", logits=1e4, causal=True),
    case("dropout", causal=True, dropout=0.3, window=(150, None)),
    case("everything", causal=True, heads=4, kv_heads=2, window=(100, None), softcap=3.0, alibi=True, sinks=True,
         dropout=0.2, lse=True),
]  # fmt: skip
BIASED = [
    case("bias", 96, bias=(1, 2, 96, 96), causal=True),
    case("bias by key", 96, batch=2, bias=(2, 1, 1, 96)),
    case("mask", 96, bias=(1, 1, 96, 96), masks=True),
]
PACKED = [
    packed("packed", 40, 0, 100, 1, 51, causal=True),
    packed("packed, all keys", 7, 185),
    packed("packed, everything", 100, 20, 72, causal=True, window=(30, None), alibi=True, sinks=True, softcap=4.0,
           heads=4, kv_heads=2),
]  # fmt: skip


class _Shared(torch.autograd.Function):
    """A tensor that all processes have: its gradient is the mean of theirs, each of which is of the whole loss."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad / dist.get_world_size()


def spread(of: AttentionCase, **options: Any) -> Callable[[Tensors], Tensors]:
    """The case on this process's part, and its results put together."""
    rows = 0 if isinstance(of, PackedAttentionCase) else 2

    def call(x: Tensors) -> Tensors:
        parts = {n: _Shared.apply(t) if t.is_floating_point() else t for n, t in x.items()}
        order = {"order": options.get("order", "zigzag")}
        for name in ("query", "key", "value"):
            parts[name] = torchweld.distributed.shard_sequence(parts[name], dim=rows, **order)
        if "bias" in parts and parts["bias"].shape[2] > 1:
            parts["bias"] = torchweld.distributed.shard_sequence(parts["bias"], dim=2, **order)
        with torchweld.distributed.context_parallel(**options):
            found = of.ours(parts)
        at = {"output": rows, "lse": 1 if rows == 0 else 2}
        return {n: torchweld.distributed.gather_sequence(t, dim=at[n], **order) for n, t in found.items()}

    return call


def ring(rank: int, folder: str) -> None:
    for each in (*CASES, *BIASED, *PACKED):
        Oracle(each, torch.float32).check(spread(each))
    for each in (PLAIN, CASES[2], CASES[6]):
        Oracle(each, torch.bfloat16).check(spread(each))
    for each in (PLAIN, CASES[4], PACKED[0], BIASED[0]):
        Oracle(each, torch.float32).check(spread(each, order="contiguous"))


def by_heads(rank: int, folder: str) -> None:
    dropped = packed("packed, dropout", 40, 0, 100, 1, 51, causal=True, dropout=0.3)
    for each in (PLAIN, CASES[2], CASES[4], CASES[6], CASES[8], CASES[11], CASES[12], *PACKED, dropped):
        Oracle(each, torch.float32).check(spread(each, method="all_to_all"))
    few = case("one key head", causal=True, heads=4, kv_heads=1)
    Oracle(few, torch.float32).check(spread(few, method="all_to_all"))


def same_bits(rank: int, folder: str) -> None:
    """On every run; and the dropped weights are those of one process."""
    each = CASES[12]
    x = each.inputs(torch.float32)
    found = [spread(each)(x) for _ in range(3)]
    assert all(torch.equal(found[0][n], other[n]) for other in found for n in other)
    ones = {**x, "value": torch.eye(256, 256).expand(1, 2, 256, 256), "sinks": x["sinks"] * 0 - torch.inf}
    wide = case("dropout", causal=True, dropout=0.3, value_dim=256)
    for method in ("ring", "all_to_all"):
        one = {n: t for n, t in ones.items() if n in ("query", "key", "value", "seed")}
        one["key"], one["value"] = one["key"].repeat_interleave(2, 1), one["value"].repeat_interleave(2, 1)
        assert torch.equal(wide.ours(one)["output"] == 0, spread(wide, method=method)(one)["output"] == 0)


def seeds(rank: int, folder: str) -> None:
    """A seed that the caller does not give is the same in all processes."""
    torch.manual_seed(rank)
    q = torch.zeros(1, 1, 128, 16)
    with torchweld.distributed.context_parallel():
        found = ops.scaled_dot_product_attention(q, q, torch.ones_like(q), dropout_p=0.5)
    assert abs(torchweld.distributed.gather_sequence(found, dim=2).mean() - 1) < 0.1


def torchs_own(rank: int, folder: str) -> None:
    """torch's function in the block, and outside of it again."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 96, 16) for h in (4, 2, 2))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    parts = [torchweld.distributed.shard_sequence(t, dim=2) for t in (q, k, v)]
    with torchweld.distributed.context_parallel():
        found = sdpa(parts[0], parts[1], parts[2], is_causal=True, enable_gqa=True)
    whole = torchweld.distributed.gather_sequence(found, dim=2)
    torch.testing.assert_close(whole, sdpa(q, k, v, is_causal=True, enable_gqa=True))
    assert not torch.allclose(sdpa(parts[0], parts[1], parts[2], is_causal=True, enable_gqa=True), found)


def compiled(rank: int, folder: str) -> None:
    """A compiled function follows the block in and out."""
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def eager(x: Tensor) -> Tensor:
        return sdpa(ops.scaled_dot_product_attention(x * 2, x, x, is_causal=True) + 1, x, x)

    torch.manual_seed(rank)
    graphs = torch.compile(eager, backend="aot_eager")
    x, y = (torch.randn(1, 2, 16, 8).requires_grad_() for _ in range(2))
    y.data.copy_(x.data)
    for _ in range(2):
        torch.testing.assert_close(graphs(x), eager(x))
        with torchweld.distributed.context_parallel():
            found, expected = graphs(x), eager(y)
        assert not torch.allclose(found, eager(x))
        torch.testing.assert_close(found, expected)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def refusals(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415

    from torchweld.distributed import all_to_all_attention, context_parallel, ring_attention, shard_sequence  # noqa: PLC0415

    def ring_of(t: Tensor, **options: Any) -> Any:
        return ring_attention(t, t, t, **options)

    q = torch.randn(1, 2, 8, 16)
    rows = q[0].transpose(0, 1)  # packed
    cu = torch.tensor([0, 8 * dist.get_world_size()], dtype=torch.int32)
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("sequence", "other"))
    differ = "expected the same shapes, dtypes and options in all 2 processes, but got others in [1] than in 0"
    wrong: list[tuple[str, Callable[[], Any]]] = [
        (
            "t: expected a multiple of 4 along dimension 1, 2 for each of 2 processes, but got 6",
            lambda: shard_sequence(rows.unsqueeze(0)[:, :6]),
        ),
        ("query: expected an even number of rows in each process", lambda: ring_of(q[:, :, :7])),
        ("key: expected query's 8 rows: a sequence attends to itself", lambda: ring_attention(q, *(q[:, :, :6],) * 2)),
        ("expected what the kernels take, but got query of dtype torch.float64", lambda: ring_of(q.double())),
        ("expected chunks of a multiple of 64 rows beside dropout_p", lambda: ring_of(q, dropout_p=0.1)),
        ("dropout_p: expected 0 beside cu_seqlens, but got 0.1", lambda: ring_of(rows, cu_seqlens=cu, dropout_p=0.1)),
        ("cu_seqlens: expected numbers that rise from 0 to the whole", lambda: ring_of(rows, cu_seqlens=cu // 2)),
        ("expected heads that 2 processes can share, but got 1 and 1", lambda: all_to_all_attention(*(q[:, :1],) * 3)),
        ("mesh: expected one dimension, along which sequences are cut, but got 2", lambda: ring_of(q, mesh=mesh)),
        (differ, lambda: ring_of(q[:, :, : 8 - 2 * rank])),
        (differ, lambda: ring_of(q, causal=rank == 0)),
    ]
    for message, call in wrong:
        with pytest.raises(RuntimeError) as raised:
            call()
        assert message in str(raised.value)
    with pytest.raises(ValueError, match="order: expected 'zigzag' or 'contiguous', but got 'striped'"):
        ring_of(q, order="striped")
    strange = context_parallel(method="tree")
    with pytest.raises(ValueError, match="method: expected 'ring' or 'all_to_all', but got 'tree'"), strange:
        pass
    torch.testing.assert_close(ring_of(q, mesh=mesh["sequence"]), ring_of(q))


def two(rank: int, folder: str) -> None:
    for check in (ring, by_heads, same_bits, seeds, torchs_own, compiled, refusals):
        check(rank, folder)


def heads_too(rank: int, folder: str) -> None:
    """A mesh of two dimensions: heads are spread along one as DTensors, sequences along the other."""
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor  # noqa: PLC0415

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("sequence", "heads"))
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 64, 16) for h in (4, 2, 2))
    along = mesh["sequence"]
    parts = [torchweld.distributed.shard_sequence(t, along, dim=2) for t in (q, k, v)]
    spread = [distribute_tensor(t, mesh["heads"], [Shard(1)]).requires_grad_() for t in parts]
    with torchweld.distributed.context_parallel(along):
        out: Any = ops.scaled_dot_product_attention(spread[0], spread[1], spread[2], is_causal=True, enable_gqa=True)
    assert isinstance(out, DTensor) and out.placements == (Shard(1),)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    expected = ops.scaled_dot_product_attention(leaves[0], leaves[1], leaves[2], is_causal=True, enable_gqa=True)
    whole = torchweld.distributed.gather_sequence(out.full_tensor(), along, dim=2)
    torch.testing.assert_close(whole, expected)
    out.sum().backward()
    expected.sum().backward()
    for part, leaf in zip(spread, leaves, strict=True):
        assert part.grad is not None and leaf.grad is not None
        mine = torchweld.distributed.shard_sequence(leaf.grad, along, dim=2)
        torch.testing.assert_close(part.grad.full_tensor(), mine)  # type: ignore[attr-defined]


def four(rank: int, folder: str) -> None:
    heads_too(rank, folder)
    for each in (PLAIN, CASES[3], CASES[4], CASES[5], CASES[7], BIASED[0], *PACKED):
        Oracle(each, torch.float32).check(spread(each))
    for each in (CASES[6], packed("packed, dropout", 40, 0, 100, 1, 51, causal=True, dropout=0.3, heads=4)):
        Oracle(each, torch.float32).check(spread(each, method="all_to_all"))
    long = case("dropout", 512, causal=True, dropout=0.3)
    Oracle(long, torch.float32).check(spread(long))


def without_the_other(rank: int, folder: str) -> None:
    """A process that has ended is an error of the others, and soon."""
    q = torch.randn(1, 2, 8, 16)
    if rank == 0:
        began = time.monotonic()
        with pytest.raises(
            RuntimeError, match=r"\[ring_attention\] mesh: expected an answer of every process, but got"
        ):
            torchweld.distributed.ring_attention(q, q, q)
        assert time.monotonic() - began < 30
    os._exit(0)


@pytest.mark.parametrize(("check", "count"), [(two, 2), (four, 4), (without_the_other, 2)])
def test_context_parallel(check: Callable[[int, str], None], count: int) -> None:
    in_processes(check, count, timeout=20 if check is without_the_other else 120)
