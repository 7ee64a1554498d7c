"""attention over packed sequences: each as if it were alone, the same bits always, and nothing read on a bad word."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leaves import penalty
from thread_counts import hold_bits
from torchweld import backend, ops, reference
from torchweld.ops._attention import Modifiers, Options
from torchweld.testing import Oracle
from torchweld.testing.attention import PackedAttentionCase


def packed(name: str, lengths: list[tuple[int, int]], **flags: object) -> PackedAttentionCase:
    queries, keys = (sum(pair[side] for pair in lengths) for side in (0, 1))
    return PackedAttentionCase(name=name, regime="", queries=queries, keys=keys, lengths=tuple(lengths), **flags)  # type: ignore[arg-type]


CASES = [
    packed("one long, many short", [(3, 3), (700, 700), *[(5, 5)] * 9], heads=1, dim=32, causal=True),
    packed("few heads, over tiles of keys", [(300, 1100), (100, 600)], heads=1, dim=16),
    packed("GQA, value's own size", [(9, 40), (33, 33), (1, 300)], heads=6, kv_heads=2, dim=24, value_dim=40),
    packed("no keys", [(4, 0), (0, 4)], lse=True, sinks=True, alibi=True),
    packed("all empty", [(0, 0), (0, 0)]),
    packed("dropout over tiles", [(200, 600), (7, 9)], heads=2, dim=16, dropout=0.5, softcap=3.0, alibi=True),
    packed("rows that see nothing", [(60, 10), (3, 300)], causal=True, bottom_right=True, lse=True),
]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_parity(case: PackedAttentionCase, dtype: torch.dtype) -> None:
    with backend.strict():
        Oracle(case, dtype).check()


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 150)), max_size=6),
    causal=st.booleans(),
    align=st.sampled_from(["top_left", "bottom_right"]),
    seed=st.integers(0, 2**31),
)
def test_each_sequence_is_a_call_of_its_own(
    lengths: list[tuple[int, int]], causal: bool, align: str, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    lens_q, lens_k = (starts([pair[side] for pair in lengths]) for side in (0, 1))
    q, dout = (torch.randn(int(lens_q[-1]), 2, 8, generator=random) for _ in range(2))
    k, v = (torch.randn(int(lens_k[-1]), 1, 8, generator=random) for _ in range(2))
    options = {"causal": causal, "causal_align": align, "return_lse": True}

    def call(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, **also: object) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out, lse = ops.attention(*leaves, **options, **also)  # type: ignore[arg-type, misc]
        return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]

    out, lse, *grads = call(q, k, v, dout, cu_seqlens_q=lens_q, cu_seqlens_k=lens_k)
    for rows, keys in zip(*(itertools.pairwise(t.tolist()) for t in (lens_q, lens_k)), strict=True):
        parts = [t[slice(*s)].transpose(0, 1).unsqueeze(0) for t, s in ((q, rows), (k, keys), (v, keys), (dout, rows))]
        one, one_lse, *one_grads = (t[0] for t in call(*parts))
        assert torch.equal(out[slice(*rows)], one.transpose(0, 1))
        assert torch.equal(lse[:, slice(*rows)], one_lse)
        for got, want, span in zip(grads, one_grads, (rows, keys, keys), strict=True):
            torch.testing.assert_close(got[slice(*span)], want.transpose(0, 1))


@pytest.mark.parametrize("lengths", [[(700, 700), (3, 90), (0, 5)], [(20, 20)] * 30], ids=["few", "many"])
def test_bits_do_not_depend_on_threads_or_repeats(lengths: list[tuple[int, int]]) -> None:
    case = packed("", lengths, causal=True, lse=True, dropout=0.3, alibi=True, sinks=True, heads=4, kv_heads=2)
    x = case.inputs(torch.bfloat16)
    leaves = {n: x[n].requires_grad_() for n in case.leaves if n in x}

    def run() -> list[Tensor]:
        outputs = case.ours(x)
        return [
            *outputs.values(),
            *torch.autograd.grad(list(outputs.values()), list(leaves.values()), [x["doutput"], x["dlse"]]),
        ]

    hold_bits(run)


Q, K = torch.randn(7, 4, 8), torch.randn(9, 2, 8)
GOOD: dict[str, Any] = {"cu_seqlens_q": starts([3, 4]), "cu_seqlens_k": starts([5, 4])}
BAD: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    "falls": (
        {"cu_seqlens_q": torch.tensor([0, 9, 7]).int()},
        ValueError,
        ["cu_seqlens_q", "never falls", "7 after 9"],
    ),
    "far beyond": (
        {"cu_seqlens_k": torch.tensor([0, 2**31 - 1, 9]).int()},
        ValueError,
        ["cu_seqlens_k", "never falls"],
    ),
    "starts late": (
        {"cu_seqlens_k": torch.tensor([1, 5, 9]).int()},
        ValueError,
        ["cu_seqlens_k", "0 as its first", "1"],
    ),
    "ends early": ({"cu_seqlens_q": torch.tensor([0, 3, 6]).int()}, ValueError, ["cu_seqlens_q", "7", "6"]),
    "ends late": ({"cu_seqlens_k": torch.tensor([0, 3, 10]).int()}, ValueError, ["cu_seqlens_k", "9", "10"]),
    "int64": ({"cu_seqlens_q": torch.tensor([0, 3, 7])}, RuntimeError, ["cu_seqlens_q", "int32", "int64", ".int()"]),
    "of two dimensions": ({"cu_seqlens_q": torch.zeros(1, 3).int()}, RuntimeError, ["cu_seqlens_q", "[batch + 1]"]),
    "another batch": ({"cu_seqlens_k": torch.tensor([0, 9]).int()}, RuntimeError, ["cu_seqlens_k", "3 elements", "2"]),
    "one missing": ({"cu_seqlens_k": None}, RuntimeError, ["cu_seqlens_k", "both", "None"]),
    "longer than said": ({"max_seqlen_q": 3}, ValueError, ["cu_seqlens_q", "max_seqlen of 3", "4"]),
    "bias": ({"bias": torch.randn(7, 9)}, RuntimeError, ["bias", "None beside cu_seqlens_q"]),
    "4 dimensions": ({"query": Q[None]}, RuntimeError, ["query", "[total, heads, head size]"]),
    "slopes": ({"alibi_slopes": torch.rand(3, 4)}, RuntimeError, ["alibi_slopes", "[4] or [2, 4]", "[3, 4]"]),
    "seed": ({"seed": torch.zeros(2).long(), "dropout_p": 0.1}, RuntimeError, ["seed", "int64 of one element", "[2]"]),
}


@pytest.mark.parametrize("what", BAD)
def test_names_what_is_wrong(what: str) -> None:
    options, kind, words = BAD[what]
    with pytest.raises(kind) as error:
        ops.attention(**({"query": Q, "key": K, "value": K} | GOOD | options))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_the_reference_checks_them_too() -> None:
    with pytest.raises(ValueError, match="cu_seqlens_q: expected a sequence that rises from 0 to 7"):
        reference.attention(Q, K, K, **(GOOD | {"cu_seqlens_q": torch.tensor([0, 8, 7])}))


def rich(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    return ops.attention(  # type: ignore[return-value]
        q, k, v, causal=True, softcap=2.0, alibi_slopes=slopes, sinks=sinks, causal_align="bottom_right", dropout_p=0.3,
        seed=torch.tensor([11]), cu_seqlens_q=starts([2, 0, 3]), cu_seqlens_k=starts([3, 1, 3]), max_seqlen_q=3,
        return_lse=True,
    )  # fmt: skip


def leaves(dtype: torch.dtype) -> list[Tensor]:
    shapes = ((5, 2, 3), (7, 1, 3), (7, 1, 2), (3, 2), (2,))
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


@pytest.mark.slow
def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(rich, leaves(torch.float64))
    assert torch.autograd.gradgradcheck(rich, leaves(torch.float64))


def test_double_backward_of_the_kernels() -> None:
    """Second derivatives of a float32 call that the kernels served: the mask is made again from the seed."""
    inputs = leaves(torch.float32)
    exact = penalty(rich, [t.detach().double().requires_grad_() for t in inputs])
    for got, want in zip(penalty(rich, inputs), exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=5e-4, atol=5e-4)


def test_compiles_to_one_graph() -> None:
    inputs = leaves(torch.float32)
    compiled = torch.compile(rich, fullgraph=True, backend="aot_eager")
    found = []
    for function in (rich, compiled):
        out, lse = function(*inputs)
        found.append([out, lse, *torch.autograd.grad(out.sum() + lse.sum(), inputs)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.slow
def test_registered_ops_pass_opcheck() -> None:
    library = torch.ops.torchweld
    q, k, v, slopes, sinks = (t.detach() for t in leaves(torch.float32))
    modifiers = Modifiers(None, slopes, sinks, torch.tensor([3]), starts([2, 0, 3]), starts([3, 1, 3]))
    rest = (*modifiers, *Options(0.5, right=0, bottom_right=True, dropout_p=0.25, max_seqlen_k=4))
    torch.library.opcheck(library.attention.default, (q, k, v, *rest))
    torch.library.opcheck(library.attention_forward.default, (q, k, v, *rest, 3))
    out, _, statistics = library.attention_forward(q, k, v, *rest, 2)
    arguments = (torch.randn_like(out), torch.randn_like(statistics[0]), out, statistics, q, k, v, *rest)
    mask = [True, True, True, False, True, True]
    torch.library.opcheck(library.attention_backward.default, (*arguments, mask, True))
