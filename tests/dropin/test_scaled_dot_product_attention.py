"""scaled_dot_product_attention: what torch.nn.functional's takes, gives and refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchweld import ops
from torchweld.reference.philox import draw_seed, dropout_factors

Call = Callable[..., Tensor]


def r(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def both(*args: Tensor, **options: object) -> None:
    """Same values, shape and dtype, and the same gradients of every input that has one."""
    dout = None
    found = []
    for function in (ops.scaled_dot_product_attention, F.scaled_dot_product_attention):
        q, k, v, *mask = (t.detach().requires_grad_(t.is_floating_point()) for t in args)
        out = function(q, k, v, *mask, **options)
        dout = torch.randn_like(out) if dout is None else dout
        leaves = [t for t in (q, k, v, *mask) if t.requires_grad]
        found.append([out, *torch.autograd.grad(out, leaves, dout)])
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if args[0].dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 2e-5}
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


FORMS = {
    "4 dimensions": ((r(2, 4, 9, 8), r(2, 4, 12, 8), r(2, 4, 12, 8)), {}),
    "3 dimensions": ((r(4, 9, 8), r(4, 12, 8), r(4, 12, 5)), {"is_causal": True}),
    "2 dimensions": ((r(9, 8), r(12, 8), r(12, 8)), {"scale": 0.1}),
    "5 dimensions": ((r(2, 3, 4, 9, 8), r(2, 3, 4, 12, 8), r(2, 3, 4, 12, 8)), {"is_causal": True}),
    "batch broadcasts": ((r(2, 4, 9, 8), r(1, 4, 12, 8), r(4, 12, 8)), {}),
    "heads broadcast": ((r(2, 4, 9, 8), r(2, 1, 12, 8), r(2, 1, 12, 8)), {}),
    "query broadcasts": ((r(1, 9, 8), r(2, 4, 12, 8), r(2, 4, 12, 8)), {}),
    "value's head size": ((r(2, 4, 9, 8), r(2, 4, 12, 8), r(2, 4, 12, 30)), {"is_causal": True}),
    "grouped queries": ((r(2, 4, 9, 8), r(2, 2, 12, 8), r(2, 2, 12, 8)), {"enable_gqa": True, "is_causal": True}),
    "grouped queries, 3 dimensions": ((r(4, 9, 8), r(2, 12, 8), r(2, 12, 8)), {"enable_gqa": True}),
    "unlike heads of key and value": ((r(2, 4, 9, 8), r(2, 2, 12, 8), r(2, 1, 12, 8)), {"enable_gqa": True}),
    "boolean mask": ((r(2, 4, 9, 8), r(2, 4, 12, 8), r(2, 4, 12, 8), r(9, 12) > -0.5), {}),
    "boolean mask by key": ((r(2, 4, 9, 8), r(2, 4, 12, 8), r(2, 4, 12, 8), r(2, 1, 1, 12) > -0.5), {}),
    "additive mask": ((r(2, 4, 9, 8), r(2, 4, 12, 8), r(2, 4, 12, 8), r(2, 1, 9, 12)), {"scale": -0.3}),
    "mask, 3 dimensions": ((r(4, 9, 8), r(4, 12, 8), r(4, 12, 8), r(4, 9, 12)), {}),
    "mask, 5 dimensions": ((r(2, 3, 4, 9, 8), r(2, 3, 4, 12, 8), r(2, 3, 4, 12, 8), r(2, 1, 4, 9, 1)), {}),
    "mask with grouped queries": (
        (r(2, 4, 9, 8), r(2, 2, 12, 8), r(2, 2, 12, 8), r(4, 9, 12) > 0),
        {"enable_gqa": True},
    ),
    "float32 mask beside bfloat16": ((*(r(1, 2, 9, 8, dtype=torch.bfloat16) for _ in range(3)), r(9, 9)), {}),
    "a step between the elements": ((r(2, 4, 8, 9).mT, r(2, 4, 8, 12).mT, r(2, 4, 30, 12).mT), {}),
    "scale 0": ((r(2, 4, 9, 8), r(2, 4, 12, 8), r(2, 4, 12, 8)), {"scale": 0.0}),
    "no queries": ((r(2, 4, 0, 8), r(2, 4, 12, 8), r(2, 4, 12, 8)), {}),
    "no keys": ((r(2, 4, 9, 8), r(2, 4, 0, 8), r(2, 4, 0, 8)), {}),
    "mask, 5 dimensions, no keys": (
        (r(2, 3, 4, 0, 8), *(r(2, 3, 4, 0, 8) for _ in range(2)), r(2, 1, 4, 1, 0) > 0),
        {},
    ),
    "no batch": ((r(0, 4, 9, 8), r(0, 4, 12, 8), r(0, 4, 12, 8)), {}),
    "heads without elements": ((r(2, 4, 9, 0), r(2, 4, 12, 0), r(2, 4, 12, 8)), {}),
    "float64": (tuple(r(2, 4, 9, 8, dtype=torch.float64) for _ in range(3)), {"is_causal": True}),
}


@pytest.mark.parametrize("form", FORMS)
def test_takes_what_torch_takes(form: str) -> None:
    args, options = FORMS[form]
    both(*args, **options)


@pytest.mark.parametrize("rows", [(9, 12), (70, 70)])
@pytest.mark.parametrize("additive", [False, True])
def test_a_mask_beside_causal_hides_more_as_with_torchs_kernel(rows: tuple[int, int], additive: bool) -> None:
    """torch's composite, which serves masks with a gradient, refuses both."""
    leaves = [r(2, 4, rows[0], 8), r(2, 2, rows[1], 8), r(2, 2, rows[1], 8)]
    mask = r(2, 1, *rows) if additive else r(*rows) > -1
    options: Any = {"attn_mask": mask, "is_causal": True, "enable_gqa": True}
    found = []
    for function in (ops.scaled_dot_product_attention, F.scaled_dot_product_attention):
        args = [t.clone().requires_grad_() for t in leaves]
        out = function(*args, **options)
        found.append([out, function(*leaves, **options), *torch.autograd.grad(out, args, out.detach())])
    torch.testing.assert_close(*found, rtol=1e-4, atol=2e-5)
    if additive:
        late = torch.ones(rows, dtype=torch.bool).triu(1)
        mask.requires_grad_()
        (dmask,) = torch.autograd.grad(ops.scaled_dot_product_attention(*leaves, **options).sum(), mask)
        assert (dmask[..., late] == 0).all() and (dmask[..., ~late] != 0).any()


Q, K, V = r(2, 4, 9, 8), r(2, 4, 12, 8), r(2, 4, 12, 8)
REFUSED: dict[str, tuple[Callable[[Call], Tensor], list[str]]] = {
    "mask of integers": (lambda f: f(Q, K, V, torch.ones(9, 12, dtype=torch.int)), ["attn_mask", "bool", "int32"]),
    "mask of float64": (lambda f: f(Q, K, V, r(9, 12).double()), ["attn_mask", "torch.float64"]),
    "mask too short": (lambda f: f(Q, K, V, r(9, 11)), ["attn_mask", "[2, 4, 9, 12]", "[9, 11]"]),
    "mask with a dimension more": (lambda f: f(Q, K, V, r(1, 1, 1, 1, 12)), ["attn_mask", "[1, 1, 1, 1, 12]"]),
    "mask with a larger batch": (lambda f: f(Q[:1], K[:1], V[:1], r(2, 1, 1, 12)), ["attn_mask", "[2, 1, 1, 12]"]),
    "head size": (lambda f: f(Q, K[..., :7], V), ["key", "head size 8", "got 7"]),
    "rows of value": (lambda f: f(Q, K, V[:, :, :11]), ["value", "12 rows"]),
    "batch": (lambda f: f(r(3, 4, 9, 8), K, V), ["key, value", "batch", "3"]),
    "heads": (lambda f: f(Q, K[:, :2], V[:, :2]), ["key, value", "4", "2"]),
    "heads that do not divide": (lambda f: f(Q, K[:, :3], V[:, :3], enable_gqa=True), ["key", "divide", "4", "3"]),
    "one dimension": (lambda f: f(r(8), r(12, 8), r(12, 8)), ["query", "at least 2", "[8]"]),
    "dtype": (lambda f: f(Q, K.double(), V), ["key, value", "torch.float32", "torch.float64", ".to()"]),
    "dropout": (lambda f: f(Q, K, V, dropout_p=1.5), ["dropout_p", "between 0 and 1", "1.5"]),
}


# torch's documentation and its composite refuse these, its CPU kernel lets them pass.
UNNOTICED = {"rows of value"}


def torch_backend(composite: bool) -> AbstractContextManager[None]:
    return sdpa_kernel(SDPBackend.MATH) if composite else nullcontext()


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_torch_refuses(name: str) -> None:
    call, words = REFUSED[name]
    with pytest.raises(RuntimeError), torch_backend(name in UNNOTICED):
        call(F.scaled_dot_product_attention)
    with pytest.raises(RuntimeError) as error:
        call(ops.scaled_dot_product_attention)
    assert all(word in str(error.value) for word in ["[scaled_dot_product_attention]", *words]), str(error.value)


ATTENTION_REFUSES = {
    "causal_align": ({"causal_align": "left"}, ValueError, ["top_left", "'left'"]),
    "window": ({"window": (-1, 0)}, ValueError, ["(left, right)", "(-1, 0)"]),
    "softcap": ({"softcap": -1.0}, ValueError, ["positive", "-1.0"]),
    "sinks": ({"sinks": r(3)}, RuntimeError, ["[4]", "[3]"]),
    "alibi_slopes": ({"alibi_slopes": r(3, 4)}, RuntimeError, ["[4] or [2, 4]", "[3, 4]"]),
    "bias": ({"bias": r(9, 13)}, RuntimeError, ["[2, 4, 9, 12]", "[9, 13]"]),
    "cu_seqlens_k": (
        {"cu_seqlens_q": torch.zeros(2, dtype=torch.int32), "query": Q[0], "key": K[0], "value": V[0]},
        RuntimeError,
        ["both", "None"],
    ),
    "query": ({"query": Q[0]}, RuntimeError, ["[batch, heads, rows, head size]", "[4, 9, 8]"]),
}


@pytest.mark.parametrize("argument", ATTENTION_REFUSES)
def test_attention_names_what_is_wrong(argument: str) -> None:
    options, kind, words = ATTENTION_REFUSES[argument]
    with pytest.raises(kind) as error:
        ops.attention(**({"query": Q, "key": K, "value": V} | options))  # type: ignore[arg-type]
    assert all(word in str(error.value) for word in [f"[attention] {argument}", *words]), str(error.value)


def test_integers_are_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"query: expected a floating-point dtype, but got torch\.int64"):
        ops.scaled_dot_product_attention(Q.long(), K.long(), V.long())


def test_a_row_that_sees_nothing_gives_zeros_and_zero_gradients() -> None:
    for nothing in (torch.zeros(9, 12, dtype=torch.bool), torch.full((9, 12), -math.inf)):
        mask = nothing.clone()
        mask[3:] = 1
        leaves = [t.detach().requires_grad_() for t in (Q, K, V)]
        out = ops.scaled_dot_product_attention(*leaves, mask)
        assert (out[:, :, :3] == 0).all() and (out[:, :, 3:] != 0).all()
        dq, dk, dv = torch.autograd.grad(out, leaves, torch.ones_like(out))
        assert (dq[:, :, :3] == 0).all()
        assert all(t.isfinite().all() and t.any() for t in (dq, dk, dv))


def test_dropout_follows_torchs_generator() -> None:
    """The seed comes from torch.manual_seed, the mask from the seed by its definition."""
    torch.manual_seed(3)
    ours = ops.scaled_dot_product_attention(Q, K, V, dropout_p=0.3)
    torch.manual_seed(3)
    factors = dropout_factors(draw_seed(Q.device), 2 * 4 * 9, 12, 0.3).view(2, 4, 9, 12)
    torch.testing.assert_close(ours, (torch.softmax(Q @ K.mT / math.sqrt(8), -1) * factors.float()) @ V)
    assert not torch.equal(ops.scaled_dot_product_attention(Q, K, V, dropout_p=0.3), ours)
    assert not ops.scaled_dot_product_attention(Q, K, V, dropout_p=1.0).any()


@pytest.mark.parametrize("masked", [False, True])
def test_autocast_computes_in_its_dtype(masked: bool) -> None:
    mask = (r(9, 12),) if masked else ()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = ops.scaled_dot_product_attention(Q, K.bfloat16(), V, *mask)
        theirs = F.scaled_dot_product_attention(Q, K.bfloat16(), V, *mask)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_function_transforms() -> None:
    def loss(q: Tensor) -> Tensor:
        return ops.scaled_dot_product_attention(q, K[0], V[0]).square().sum()

    torch.testing.assert_close(vmap(grad(loss))(Q)[1], grad(loss)(Q[1]))


def test_compiles_to_one_graph_with_dynamic_lengths() -> None:
    compiled = torch.compile(ops.scaled_dot_product_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (9, 13, 30):
        q = r(2, 4, length, 8).requires_grad_()
        k, v, mask = r(2, 4, length + 3, 8), r(2, 4, length + 3, 5), r(length, length + 3) > 0
        out, expected = compiled(q, k, v, mask), ops.scaled_dot_product_attention(q, k, v, mask)
        assert torch.equal(out, expected)
        (got,), (want,) = (torch.autograd.grad(t.sum(), q) for t in (out, expected))
        assert torch.equal(got, want)
