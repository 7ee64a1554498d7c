"""What torchweld puts in the place of aten's flash attention, called as it is: signatures, outputs, dropout."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from torchweld import reference
from torchweld.integrations import torch_sdpa

aten = torch.ops.aten
OPERATORS = {
    "cpu_forward": aten._scaled_dot_product_flash_attention_for_cpu,
    "cpu_backward": aten._scaled_dot_product_flash_attention_for_cpu_backward,
    "cuda_forward": aten._scaled_dot_product_flash_attention,
    "cuda_backward": aten._scaled_dot_product_flash_attention_backward,
}


@pytest.mark.parametrize("name", OPERATORS)
def test_arguments_are_those_of_the_operator(name: str) -> None:
    schema = OPERATORS[name].default._schema
    ours = inspect.signature(getattr(torch_sdpa, name)).parameters.values()
    assert [p.name for p in ours] == [a.name for a in schema.arguments]
    for mine, theirs in zip(ours, schema.arguments, strict=True):
        assert (mine.kind is mine.KEYWORD_ONLY) == theirs.kwarg_only
        assert theirs.has_default_value() == (mine.default is not mine.empty)
        assert mine.default is mine.empty or mine.default == theirs.default_value


def layouts() -> dict[str, list[Tensor]]:
    merged = torch.randn(2, 70, 3, 4, 16)
    return {
        "contiguous": [torch.randn(2, 4, n, 16) for n in (70, 90, 90)],
        "heads merged": [torch.randn(2, n, 4, 16).transpose(1, 2) for n in (70, 90, 90)],
        "one projection": [merged[:, :, n].transpose(1, 2) for n in range(3)],
        "expanded": [torch.randn(1, 4, n, 16).expand(2, 4, n, 16) for n in (70, 90, 90)],
    }


def as_promised(found: Any, promised: Any) -> None:
    for got, want in zip(found, promised, strict=True):
        if isinstance(want, Tensor):
            assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())
        else:
            assert got == want


def meta(values: list[Any]) -> list[Any]:
    return [v.to("meta") if isinstance(v, Tensor) else v for v in values]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("layout", layouts())
def test_outputs_are_what_the_fake_kernels_promise(layout: str, kind: str) -> None:
    qkv = [t.bfloat16() if layout == "contiguous" else t for t in layouts()[layout]]
    forward, backward = (getattr(torch_sdpa, f"{kind}_{way}") for way in ("forward", "backward"))
    out = forward(*qkv, 0.0, True)
    as_promised(out, OPERATORS[f"{kind}_forward"](*meta(qkv), 0.0, True))
    between = out[1:6] if kind == "cuda" else out[1:2]
    rest = [torch.ones_like(out[0]), *qkv, out[0], *between, 0.0, True, *(out[6:8] if kind == "cuda" else ())]
    as_promised(backward(*rest), OPERATORS[f"{kind}_backward"](*meta(rest)))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("on", ["cpu", "emulated cuda"])
def test_what_the_cuda_functions_compute(on: str, dropout_p: float, request: pytest.FixtureRequest) -> None:
    """The seed that the forward draws reaches the backward through torch's state of the generator."""
    if on != "cpu":
        assert isinstance(request.getfixturevalue("emulated"), ModuleType)
    q, k, v, dout = (torch.randn(1, 2, n, 16) for n in (70, 80, 80, 70))
    torch.manual_seed(5)
    out = torch_sdpa.cuda_forward(q, k, v, dropout_p, True, scale=0.4)
    assert out is not None
    grads = torch_sdpa.cuda_backward(dout, q, k, v, out[0], out[1], *out[2:6], dropout_p, True, *out[6:8], scale=0.4)
    assert grads is not None
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    seed = out[6].view(torch.int64)[:1]
    exact = reference.attention(*leaves, causal=True, dropout_p=dropout_p, seed=seed, scale=0.4)
    assert isinstance(exact, Tensor)
    expected = [exact, *torch.autograd.grad(exact, leaves, dout.double())]
    for got, want in zip((out[0], *grads), expected, strict=True):
        torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=2e-5)


def test_a_debug_mask_is_left_to_torch() -> None:
    q = torch.randn(1, 2, 70, 16)
    assert torch_sdpa.cuda_forward(q, q, q, 0.1, False, True) is None
