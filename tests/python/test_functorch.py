"""torch.func and autograd's other ways: grad, vmap, functional_call, jvp, batched gradients; refused layouts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, jvp, vmap

from torchweld import nn, ops, reference

W, B, TARGET = torch.randn(8), torch.randn(8), torch.tensor([0, 7, 3, -100, 1])
SEED = torch.tensor([7])
KEY, VALUE = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
# Of one tensor, (2, 5, 8) of float32, which the kernels serve; and the same by the definition, for float64.
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "layer_norm": lambda of, x: of.layer_norm(x, (8,), W.to(x.dtype), B.to(x.dtype)),
    "add_layer_norm": lambda of, x: torch.cat(of.add_layer_norm(x, x.flip(-1), (8,), W.to(x.dtype), B.to(x.dtype))),
    "rms_norm": lambda of, x: of.rms_norm(x, (8,), W.to(x.dtype)),
    "dropout": lambda of, x: of.dropout(x, 0.3, seed=SEED),
    "gelu": lambda of, x: of.gelu(x, "tanh"),
    "swiglu": lambda of, x: of.swiglu(x, x.flip(-1)),
    "geglu": lambda of, x: of.geglu(x),
    "rotary_embedding": lambda of, x: torch.cat(of.rotary_embedding(x[None], x.flip(0)[None])),
    "cross_entropy": lambda of, x: of.cross_entropy(x.flatten(0, -2), TARGET.repeat(x.shape[0]), reduction="none"),
    "linear_cross_entropy": lambda of, x: of.linear_cross_entropy(
        x, KEY[0].to(x.dtype), TARGET.clamp(max=4).expand(x.shape[:-1]), VALUE[0, :, 0].to(x.dtype), reduction="none"
    ),
    "scaled_dot_product_attention": lambda of, x: of.scaled_dot_product_attention(
        x, KEY.to(x.dtype), VALUE.to(x.dtype), is_causal=True
    ),
    "attention": lambda of, x: of.attention(
        x[None], KEY[None].to(x.dtype), VALUE[None].to(x.dtype), causal=True, window=(2, 0), softcap=5.0
    ),
}


@pytest.fixture(params=FUNCTIONS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def of(name: str) -> Callable[[Tensor], Tensor]:
    return lambda x: FUNCTIONS[name](ops, x)


def exact(name: str) -> Callable[[Tensor], Tensor]:
    return lambda x: FUNCTIONS[name](reference, x)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=1e-4, atol=1e-5)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, 8)


def test_vmap_and_grad(name: str, x: Tensor) -> None:
    many = torch.randn(3, 2, 5, 8)
    close(vmap(of(name))(many), torch.stack([exact(name)(one.double()) for one in many]))
    close(grad(lambda t: of(name)(t).sin().sum())(x), grad(lambda t: exact(name)(t).sin().sum())(x.double()))


def test_forward_mode(name: str, x: Tensor) -> None:
    direction = torch.randn_like(x)
    got, expected = jvp(of(name), (x,), (direction,)), jvp(exact(name), (x.double(),), (direction.double(),))
    close(got[1], expected[1])
    with torch.autograd.forward_ad.dual_level():
        dual = of(name)(torch.autograd.forward_ad.make_dual(x, direction))
        close(torch.autograd.forward_ad.unpack_dual(dual).tangent, expected[1])


def test_jacobian_by_batched_gradients(name: str, x: Tensor) -> None:
    expected = jacrev(exact(name))(x.double())
    close(jacrev(of(name))(x), expected)
    close(torch.autograd.functional.jacobian(of(name), x, vectorize=True), expected)


def test_second_derivatives_of_what_the_kernels_made(name: str, x: Tensor) -> None:
    def second(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (first,) = torch.autograd.grad(function(x).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0].double()

    expected = second(exact(name), x.double())
    # Rows of nearly one value make second derivatives that float32 cannot hold: torch's own error there tells how far.
    torchs = (second(exact(name), x) - expected).abs().max().item()
    torch.testing.assert_close(second(of(name), x), expected, rtol=1e-4, atol=1e-5 + 4 * torchs)


def test_per_sample_gradients_of_modules() -> None:
    model = torch.nn.Sequential(nn.LayerNorm(8), torch.nn.Linear(8, 8), nn.LayerNorm(8))
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    samples = torch.randn(4, 3, 8)

    def loss(p: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, p, (sample,)).square().mean()

    got = vmap(grad(loss), (None, 0))(parameters, samples)
    for i, sample in enumerate(samples):
        expected = torch.autograd.grad(loss(parameters, sample), list(parameters.values()))
        for key, g in zip(parameters, expected, strict=True):
            close(got[key][i], g)


def test_sparse_inputs_are_refused() -> None:
    with pytest.raises(
        TypeError, match=r"input: expected a dense tensor, but got a sparse_coo one; .* x\.to_dense\(\)"
    ):
        ops.layer_norm(torch.eye(8).to_sparse(), (8,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)  # a kernel, the reference
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_sparse_weights_are_refused(name: str, dtype: torch.dtype) -> None:
    """The reference's product with one would be sparse."""
    weight = torch.eye(8, dtype=dtype)[0].to_sparse()
    with pytest.raises(TypeError, match=rf"\[{name}\] weight: expected a dense tensor, but got a sparse_coo one"):
        getattr(ops, name)(torch.randn(3, 8, dtype=dtype), (8,), weight)
