"""Every function of torchweld.ops on DTensors, beside the definition on one process, by the rule of exactness."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gloo_processes import in_processes, needs_gloo
from torchweld import nn, ops
from torchweld.testing.attention_case import AttentionCase
from torchweld.testing.case import Case, Oracle, Tensors
from torchweld.testing.cases import cases

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

pytestmark = [needs_gloo, pytest.mark.slow]
SMALL = 1 << 14
MODIFIED = (
    "GQA 8:2",
    "ALiBi",
    "sinks",
    "bias by key",
    "mask",
    "lse",
    "packed",
    "merged heads",
    "1 x 40",
    "2 x 260, everything",
)
OPS = [
    *("attention", "layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm", "gelu", "swiglu", "geglu"),
    *("rotary_embedding", "cross_entropy", "linear_cross_entropy", "paged_attention"),
]
FIRST = ("query", "input", "x", "gate", "logits")
# On a mesh of two dimensions, and what the first argument is sharded along there.
BOTH = {"attention": (0, 1), "layer_norm": (0, 1), "gelu": (0, 0), "cross_entropy": (0, 1), "rotary_embedding": (0, 2)}


def spread(t: Tensor, mesh: DeviceMesh, dims: Sequence[int | None]) -> Any:
    """`t`, the same in all processes, sharded along `dims`; differentiable."""
    from torch.distributed.tensor import DTensor, Replicate, Shard  # noqa: PLC0415

    whole = DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=[Replicate() if d is None else Shard(d) for d in dims])


def gathered(t: Any) -> Tensor:
    found: Tensor = t.full_tensor()
    return found


def on_mesh(case: Case, mesh: DeviceMesh, of: Callable[[str, Tensor], Sequence[int | None]]) -> Callable[..., Tensors]:
    """The case by DTensors; `of` says along what an argument is sharded."""

    def call(x: Tensors) -> Tensors:
        parts = {n: t if n.startswith("d") else spread(t, mesh, of(n, t)) for n, t in x.items()}
        return {n: gathered(t) for n, t in case.ours(parts).items()}

    return call


def first_sharded(dims: Sequence[int]) -> Callable[[str, Tensor], Sequence[int | None]]:
    return lambda name, t: dims if name in FIRST and max(dims) < t.dim() else [None] * len(dims)


def small(op: str) -> Iterator[Case]:
    for case in cases(op):
        x = case.inputs(torch.float32)
        numel = sum(t.numel() for t in x.values())
        if (numel < SMALL and "seed" not in x) or case.name in MODIFIED:
            yield case


def everything(rank: int, folder: str) -> None:
    """All small cases, with the first argument sharded along each of its dimensions in turn."""
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415

    mesh = init_device_mesh("cpu", (2,))
    for op in OPS:
        for case in small(op):
            oracle = Oracle(case, torch.float32)
            for d in range(max(t.dim() for n, t in oracle.inputs[0].items() if n in FIRST)):
                oracle.check(on_mesh(case, mesh, first_sharded([d])))
        if op != "rotary_embedding":
            case = next(small(op))
            Oracle(case, torch.bfloat16).check(on_mesh(case, mesh, first_sharded([0])))
    layouts(mesh)
    vocabulary(mesh)
    dropout(mesh)
    modules(mesh)
    refusals(mesh)


def layouts(mesh: DeviceMesh) -> None:
    """The layout that goes in comes out; heads that are shared, or broadcast, stay with their group."""
    from torch.distributed.tensor import Replicate, Shard  # noqa: PLC0415

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 6, 8) for h in (4, 2, 2))
    for d in (0, 1):
        out: Any = ops.attention(spread(q, mesh, [d]), spread(k, mesh, [d]), spread(v, mesh, [d]), causal=True)
        assert out.placements == (Shard(d),)
        out = ops.scaled_dot_product_attention(
            spread(q, mesh, [d]), spread(k, mesh, [d]), spread(v, mesh, [d]), is_causal=True, enable_gqa=True
        )
        assert out.placements == (Shard(d),)
        torch.testing.assert_close(
            gathered(out), F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        )
    one = k[:, :1]
    out = ops.attention(spread(q, mesh, [1]), spread(one, mesh, [None]), spread(one, mesh, [None]))
    assert out.placements == (Shard(1),)
    three: Any = ops.attention(*(spread(q[:, :3], mesh, [1]) for _ in range(3)))  # heads that do not divide
    assert three.placements == (Shard(1),)
    torch.testing.assert_close(gathered(three), ops.attention(*(q[:, :3],) * 3))
    mask = torch.rand(2, 4, 6, 6) > 0.3
    full = [torch.randn(2, 4, 6, 8) for _ in range(3)]
    expected = F.scaled_dot_product_attention(full[0], full[1], full[2], mask)
    for d in (0, 1, 2):
        part, key, value = (spread(t, mesh, [d if d < 2 or i == 0 else None]) for i, t in enumerate(full))
        out = ops.scaled_dot_product_attention(part, key, value, spread(mask, mesh, [None]))
        assert out.placements == (Shard(d),)
        torch.testing.assert_close(gathered(out), expected)
    x = torch.randn(3, 4, 8)
    out = ops.layer_norm(spread(x, mesh, [2]), (8,))  # the normalised dimension is made whole
    assert out.placements == (Replicate(),)
    torch.testing.assert_close(gathered(out), F.layer_norm(x, (8,)))
    turned = ops.rotary_embedding(spread(q, mesh, [1]), spread(one, mesh, [None]))  # a key with one head
    for got, expected in zip(turned, ops.rotary_embedding(q, one), strict=True):
        torch.testing.assert_close(gathered(got), expected)
    query = spread(q, mesh, [1])
    assert ops.rotary_embedding(query, inplace=True) is query
    torch.testing.assert_close(gathered(query), ops.rotary_embedding(q))


def vocabulary(mesh: DeviceMesh) -> None:
    """Losses whose classes are sharded keep them so: the gradient too."""
    from torch.distributed.tensor import Shard  # noqa: PLC0415

    for op in ("cross_entropy", "linear_cross_entropy"):
        for case in small(op):
            if case.name == "33 x 10" or "smooth" not in case.name:
                Oracle(case, torch.float32).check(on_mesh(case, mesh, _by_class(op)))
    torch.manual_seed(0)
    hidden, weight, target = torch.randn(6, 8), torch.randn(10, 8), torch.randint(10, (6,))
    split = spread(weight, mesh, [0]).detach().requires_grad_()
    loss: Any = ops.linear_cross_entropy(spread(hidden, mesh, [None]), split, target)
    loss.backward()
    assert split.grad is not None and split.grad.placements == (Shard(0),)
    for given in ([0], [1]):
        plain = hidden.clone().requires_grad_()
        found: Any = ops.cross_entropy(spread(plain, mesh, given), target.clamp(0, 7), reduction="none")
        torch.testing.assert_close(gathered(found), F.cross_entropy(hidden, target.clamp(0, 7), reduction="none"))
    with pytest.raises(IndexError, match=r"expected classes from 0 to 7 or -100"):
        ops.cross_entropy(spread(hidden, mesh, [1]), torch.full((6,), 8))
    with pytest.raises(TypeError, match=r"where its classes are sharded, but got torch\.float64"):
        ops.cross_entropy(spread(hidden.double(), mesh, [1]), target.clamp(0, 7))


def _by_class(op: str) -> Callable[[str, Tensor], Sequence[int | None]]:
    at = {"input": 1, "logits": 1} if op == "cross_entropy" else {"weight": 0, "bias": 0}
    return lambda name, t: [at.get(name)]


def dropout(mesh: DeviceMesh) -> None:
    """Parts have different masks, and the backward those of the forward."""
    torch.manual_seed(3)
    x = spread(torch.ones(8, 64), mesh, [0]).detach().requires_grad_()
    _, total = ops.add_layer_norm(x, spread(torch.zeros(8, 64), mesh, [0]), (64,), dropout_p=0.5)
    total.sum().backward()
    kept = gathered(total)
    assert torch.equal(gathered(x.grad), kept)
    assert set(kept.unique().tolist()) == {0.0, 2.0} and not torch.equal(kept[:4], kept[4:])
    x = spread(torch.ones(8, 64), mesh, [1]).detach().requires_grad_()
    for call in (ops.dropout, nn.Dropout(0.5), torch.compile(ops.dropout, fullgraph=True, backend="aot_eager")):
        y = call(x)
        dx = torch.autograd.grad(y.sum(), x)[0]
        kept = gathered(y)
        assert torch.equal(gathered(dx), kept)
        assert call is not ops.dropout or not torch.equal(kept[:, :32], kept[:, 32:])
    assert ops.dropout(x, 0.5, False) is x
    q, v = spread(torch.zeros(1, 4, 64, 8), mesh, [1]), spread(torch.ones(1, 4, 64, 8), mesh, [1])
    weights = gathered(ops.scaled_dot_product_attention(q, q, v, dropout_p=0.5))
    assert abs(weights.mean() - 1) < 0.05 and not torch.equal(weights[:, :2], weights[:, 2:])
    copies: Any = ops.scaled_dot_product_attention(*(spread(torch.ones(1, 1, 4, 4), mesh, [None]),) * 3, dropout_p=0.5)
    assert torch.equal(gathered(copies), copies.to_local())


def modules(mesh: DeviceMesh) -> None:
    """torchweld.nn on sharded inputs and parameters; eager, then compiled in one graph."""
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor  # noqa: PLC0415

    torch.manual_seed(0)
    makers: tuple[Callable[[], Any], ...] = (partial(nn.LayerNorm, 8), partial(nn.RMSNorm, 8), nn.SwiGLU)
    for make in makers:
        alone, module = make(), distribute_module(make(), mesh)
        x = torch.randn(4, 6, 8)
        g = torch.randn_like(alone(x))
        mine = x.clone().requires_grad_()
        alone(mine).backward(g)
        for call in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
            part = distribute_tensor(x, mesh, [Shard(1)]).requires_grad_()
            out = call(part)
            assert out.placements == (Shard(1),)
            out.backward(distribute_tensor(g, mesh, [Shard(1)]))
            torch.testing.assert_close(gathered(part.grad), mine.grad)
            for p, q in zip(module.parameters(), alone.parameters(), strict=True):
                torch.testing.assert_close(gathered(p.grad), q.grad)
                p.grad = None

    def loss(q: Tensor, w: Tensor, target: Tensor) -> Tensor:
        y = ops.gelu(ops.scaled_dot_product_attention(q, q, q, is_causal=True)).transpose(1, 2).flatten(2)
        return ops.linear_cross_entropy(y, w, target)

    q, w, target = torch.randn(2, 4, 6, 8, requires_grad=True), torch.randn(10, 32), torch.randint(10, (2, 6))
    expected = loss(q, w, target)
    expected.backward()
    for cut in (0, None):
        heads = spread(q.detach(), mesh, [1]).requires_grad_()
        found: Any = torch.compile(loss, fullgraph=True, backend="aot_eager")(
            heads, spread(w, mesh, [cut]), spread(target, mesh, [None])
        )
        torch.testing.assert_close(gathered(found), expected)
        found.backward()
        torch.testing.assert_close(gathered(heads.grad), q.grad)


def refusals(mesh: DeviceMesh) -> None:
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415

    x = torch.randn(4, 8)
    other = init_device_mesh("cpu", (2, 1))
    with pytest.raises(RuntimeError, match=r"\[layer_norm\] weight: expected a DTensor on the mesh of the other"):
        ops.layer_norm(spread(x, mesh, [0]), (8,), spread(x[0], other, [None, None]))
    with pytest.raises(TypeError, match=r"\[layer_norm\] weight: expected a DTensor beside other DTensors, but got a"):
        ops.layer_norm(spread(x, mesh, [0]), (8,), x[0].clone().requires_grad_())
    with pytest.raises(RuntimeError, match=r"beside dropout_p, but got shapes \[\[4, 8\]"):
        ops.scaled_dot_product_attention(*(spread(x, mesh, [0]),) * 3, dropout_p=0.1)


def two_dimensions(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415

    torch.manual_seed(0)
    ones = torch.ones(8, 64)
    line = init_device_mesh("cpu", (4,))
    _, total = ops.add_layer_norm(spread(ones, line, [0]), spread(0 * ones, line, [0]), (64,), dropout_p=0.5)
    assert len({tuple(part.flatten().tolist()) for part in gathered(total).chunk(4)}) == 4  # four masks
    mesh = init_device_mesh("cpu", (2, 2))
    for op, dims in BOTH.items():
        for case in list(small(op))[:8]:
            Oracle(case, torch.float32).check(on_mesh(case, mesh, first_sharded(dims)))
    grouped = AttentionCase(
        name="GQA", regime="", heads=4, kv_heads=2, batch=2, queries=20, keys=20, dim=8, causal=True
    )
    pairs: list[Sequence[int | None]] = [(0, 1), (1, 1), (1, None)]
    for each in pairs:
        Oracle(grouped, torch.float32).check(on_mesh(grouped, mesh, lambda name, t, each=each: each))  # type: ignore[misc]
    case = cases("linear_cross_entropy")[0]
    both: dict[str, Sequence[int | None]] = {
        "input": (0, None),
        "target": (0, None),
        "weight": (None, 0),
        "bias": (None, 0),
    }
    Oracle(case, torch.float32).check(on_mesh(case, mesh, lambda name, t: both.get(name, (None, None))))


@pytest.mark.parametrize(("check", "count"), [(everything, 2), (two_dimensions, 4)])
def test_dtensors(check: Callable[[int, str], None], count: int) -> None:
    in_processes(check, count)
