"""What the add_ forms have in front of their norm: dropout, and a residual stream with a dtype of its own."""

from __future__ import annotations

import pytest
import torch

from torchweld import ops, reference
from torchweld.reference.philox import draw_seed, dropout_factors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [1, 7, 16, 200, 9001])
def test_the_mask_is_its_definition(cols: int, dtype: torch.dtype, isa: str) -> None:
    """Of ones onto zeros the sum is the mask itself; the gradient goes through the same one."""
    x, residual = torch.ones(5, cols, dtype=dtype, requires_grad=True), torch.zeros(5, cols, dtype=dtype)
    seed = torch.tensor([-(2**40) + 3])
    for p in (0.25, 0.5, 1.0):
        normed, total = ops.add_layer_norm(x, residual, (cols,), dropout_p=p, seed=seed)
        mask = dropout_factors(seed, 5, cols, p).to(dtype)
        assert torch.equal(total, mask)
        (only,) = torch.autograd.grad(total.sum(), x, retain_graph=True)
        (both,) = torch.autograd.grad((total * 2 + normed * 0).sum(), x)  # this one comes from the kernel
        assert torch.equal(only, mask) and torch.equal(both, mask * 2)


def test_the_seed_is_drawn_from_torchs_generator() -> None:
    x, residual = torch.randn(40, 64), torch.randn(40, 64)
    torch.manual_seed(5)
    first, second = (ops.add_rms_norm(x, residual, (64,), dropout_p=0.5)[1] for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(ops.add_rms_norm(x, residual, (64,), dropout_p=0.5)[1], first)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    seed = draw_seed(x.device)
    assert torch.equal(first, reference.add_rms_norm(x, residual, (64,), dropout_p=0.5, seed=seed)[1])


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("wide", [False, True])
def test_gradients_of_x_and_residual_apart(wanted: tuple[bool, bool], dropout_p: float, wide: bool) -> None:
    """Each is what it is when both are asked for, in its own dtype; and so where they can be differentiated again."""
    x, dy = (torch.randn(30, 50, dtype=torch.bfloat16) for _ in range(2))
    r, ds = (torch.randn(30, 50, dtype=torch.float32 if wide else torch.bfloat16) for _ in range(2))
    seed = torch.tensor([3])

    def gradients(wanted: tuple[bool, bool], **again: bool) -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_(w) for t, w in zip((x, r), wanted, strict=True)]
        first, second = leaves
        outputs = ops.add_layer_norm(first, second, (50,), dropout_p=dropout_p, seed=seed)
        assert outputs[0].dtype == x.dtype and outputs[1].dtype == r.dtype
        return list(torch.autograd.grad(outputs, [t for t in leaves if t.requires_grad], (dy, ds), **again))

    expected = [g for g, w in zip(gradients((True, True)), wanted, strict=True) if w]
    for got, one in zip(gradients(wanted), expected, strict=True):
        assert torch.equal(got, one)
    for got, one in zip(gradients(wanted, create_graph=True), expected, strict=True):
        assert got.dtype == one.dtype and got.requires_grad
        torch.testing.assert_close(got, one, rtol=2e-2, atol=2e-2)


def test_a_residual_narrower_than_x_goes_to_the_reference() -> None:
    x, r = torch.randn(6, 20), torch.randn(6, 20).bfloat16()
    normed, total = ops.add_layer_norm(x, r, (20,))
    assert normed.dtype == torch.float32 and torch.equal(total, (x + r.float()).bfloat16())
    torch.testing.assert_close(normed, torch.nn.functional.layer_norm(total.float(), (20,)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["add_layer_norm", "add_rms_norm"])
def test_dropout_compiles_without_a_break(name: str) -> None:
    """The seed is drawn inside the graph, and the backward makes the forward's mask again."""
    x, r = (torch.randn(9, 40, requires_grad=True) for _ in range(2))

    def step(x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        normed, total = getattr(ops, name)(x, r, (40,), dropout_p=0.5)
        return normed.sin() + total * x.detach()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    expected = step(x, r)
    torch.manual_seed(3)
    got = compiled(x, r)
    torch.testing.assert_close(got, expected)
    for g, e in zip(torch.autograd.grad(got.sum(), (x, r)), torch.autograd.grad(expected.sum(), (x, r)), strict=True):
        torch.testing.assert_close(g, e)
