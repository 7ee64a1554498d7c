"""Dropout of attention: one mask by its definition, whatever computes it, and torch's generator decides which."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from thread_counts import hold_bits
from torchweld import backend, ops
from torchweld.reference.philox import dropout_factors
from torchweld.testing import Oracle
from torchweld.testing.attention import AttentionCase

DTYPES = (torch.float32, torch.bfloat16)
SEED = torch.tensor([-(2**61) - 12345])


def wide(name: str, queries: int, keys: int, **flags: object) -> AttentionCase:
    return AttentionCase(name=name, regime="", queries=queries, keys=keys, **flags)  # type: ignore[arg-type]


CASES = [
    wide("over tiles", 200, 700, dropout=0.1, heads=1, dim=16),
    wide("GQA, window", 90, 130, dropout=0.5, heads=4, kv_heads=2, window=(40, 7), lse=True),
    wide("bias", 50, 71, dropout=0.3, batch=2, bias=(1, 2, 50, 71), softcap=3.0, causal=True),
    wide("bias by key, mask", 50, 71, dropout=0.3, batch=2, bias=(2, 1, 1, 71)),
    wide("ALiBi, sinks", 60, 60, dropout=0.2, heads=4, alibi=True, sinks=True, causal=True),
    wide("all of it", 20, 30, dropout=1.0),
    wide("next to none", 20, 30, dropout=1e-9),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_parity(case: AttentionCase, dtype: torch.dtype) -> None:
    with backend.strict():
        Oracle(case, dtype).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(3, 300), (130, 67), (100, 600)])
def test_the_mask_is_its_definition(queries: int, keys: int, dtype: torch.dtype, isa: str, threads: None) -> None:
    """With the unit vectors as values, the output is the dropped softmax itself."""
    q, k = torch.randn(2, 2, queries, 16, dtype=dtype), torch.randn(2, 2, keys, 16, dtype=dtype)
    v = torch.eye(keys, dtype=dtype).expand(2, 2, -1, -1)
    expected = dropout_factors(SEED, 4 * queries, keys, 0.4).view(2, 2, queries, keys) != 0
    for count in (1, 2):
        torch.set_num_threads(count)
        for return_lse in (False, True):
            found = ops.attention(q, k, v, dropout_p=0.4, seed=SEED, return_lse=return_lse)
            out = found[0] if isinstance(found, tuple) else found
            assert torch.equal(out != 0, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 700, 700, 32), (3, 4, 97, 130, 16)], ids=str)
def test_bits_do_not_depend_on_threads_or_repeats(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    batch, heads, queries, keys, size = shape
    q, dout = (torch.randn(batch, heads, queries, size, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(batch, heads, keys, size, dtype=dtype) for _ in range(2))
    slopes = torch.rand(batch, heads)

    def run() -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (q, k, v, slopes)]
        out = ops.attention(*leaves[:3], causal=True, alibi_slopes=leaves[3], dropout_p=0.2, seed=SEED)
        assert isinstance(out, Tensor)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    hold_bits(run)


def test_checkpointing_replays_the_mask() -> None:
    x = torch.randn(1, 2, 40, 16)

    def grad(wrapped: bool) -> Tensor:
        torch.manual_seed(5)
        leaf = x.clone().requires_grad_()

        def call(t: Tensor) -> Tensor:
            return ops.scaled_dot_product_attention(t, t, t, dropout_p=0.5)

        out = checkpoint(call, leaf, use_reentrant=False) if wrapped else call(leaf)
        return torch.autograd.grad(out.square().sum(), leaf)[0]

    assert torch.equal(grad(True), grad(False))


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_to_one_graph(compiler: str) -> None:
    """A graph of its own draws the seed: with no dropout the same numbers, with some other ones at every call."""
    inputs = [torch.randn(2, 2, 20, 16, requires_grad=True) for _ in range(3)]

    def call(p: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.scaled_dot_product_attention(q, k, v, dropout_p=p)

    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    torch.testing.assert_close(compiled(0.0, *inputs), call(0.0, *inputs))
    first, second = (compiled(0.5, *inputs) for _ in range(2))
    assert not torch.equal(first, second)
    dout = torch.randn_like(first)
    assert not torch.equal(*(torch.autograd.grad(out, inputs[2], dout)[0] for out in (first, second)))
