"""The modules that torch.nn has no twin of: gated units and rotary embeddings."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from torchweld import nn, ops


def test_gated_units_are_the_functions() -> None:
    gate, up = torch.randn(3, 8), torch.randn(3, 8)
    packed = torch.cat((gate, up), -1)
    assert torch.equal(nn.SwiGLU()(gate, up), ops.swiglu(gate, up)) and torch.equal(
        nn.SwiGLU()(packed), ops.swiglu(packed)
    )
    for approximate in ("none", "tanh"):
        module = nn.GEGLU(approximate)
        assert torch.equal(module(gate, up), ops.geglu(gate, up, approximate=approximate))
        assert repr(module) == f"GEGLU(approximate={approximate!r})"
    with pytest.raises(RuntimeError, match=r"\[geglu\] approximate: expected 'none' or 'tanh', but got 'erf'"):
        nn.GEGLU("erf")(gate, up)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_embedding_keeps_its_tables(interleaved: bool) -> None:
    module = nn.RotaryEmbedding(12, 50, 500.0, interleaved=interleaved)
    query, key = torch.randn(2, 3, 7, 16), torch.randn(2, 1, 7, 16)
    options = {"base": 500.0, "rotary_dim": 12, "interleaved": interleaved}
    for ids in (None, torch.randint(50, (2, 7))):
        for got, expected in zip(
            module(query, key, position_ids=ids),
            ops.rotary_embedding(query, key, position_ids=ids, **options),  # type: ignore[arg-type]
            strict=True,
        ):
            torch.testing.assert_close(got, expected)
    assert not module.state_dict() and not list(module.parameters())
    assert module(query, inplace=True) is query


def test_rotary_tables_stay_float32() -> None:
    module = nn.RotaryEmbedding(8, 9)
    cos = module.cos.clone()
    for other in (
        torch.nn.Sequential(copy.deepcopy(module)).bfloat16()[0],
        copy.deepcopy(module).to(torch.float64),
        pickle.loads(pickle.dumps(module)),
    ):
        assert other.cos.dtype is torch.float32 and torch.equal(other.cos, cos)
    query = torch.randn(1, 2, 9, 8).bfloat16()
    exact = ops.rotary_embedding(query.double(), None, cos.double(), module.sin.double())
    torch.testing.assert_close(module.bfloat16()(query).double(), exact, rtol=2**-8, atol=0)


def test_rotary_tables_after_to_empty() -> None:
    stock, late = nn.RotaryEmbedding(8, 900), nn.RotaryEmbedding(8, 900, device="meta")
    assert late.cos.is_meta and late.to(torch.bfloat16).cos.is_meta
    torch.nn.Sequential(late).to_empty(device="cpu")
    assert torch.equal(late.cos, stock.cos) and torch.equal(late.sin, stock.sin)
    late.cos.zero_()
    late.reset_parameters()
    assert torch.equal(late.cos, stock.cos)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"\[RotaryEmbedding\] dim: expected an even number from 2 on, but got 7"):
        nn.RotaryEmbedding(7)
    with pytest.raises(TypeError, match=r"\[RotaryEmbedding\] base: expected a number, but got 'e'"):
        nn.RotaryEmbedding(8, base="e")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"query: expected at most 4 tokens, but got 5; make it with max_positions=5"):
        nn.RotaryEmbedding(8, 4)(torch.randn(1, 1, 5, 8))
    with pytest.raises(ValueError, match=r"position_ids: expected positions from 0 to 3, the rows of cos, but got 4"):
        nn.RotaryEmbedding(8, 4)(torch.randn(1, 1, 5, 8), position_ids=torch.arange(5))
