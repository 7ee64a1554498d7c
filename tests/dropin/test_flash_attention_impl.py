"""torch.nn.attention.activate_flash_attention_impl("torchweld"): F.scaled_dot_product_attention on our kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import attention as torch_attention

from torchweld import backend
from torchweld.integrations import torch_sdpa
from torchweld.testing import Oracle
from torchweld.testing.attention import ATTENTION, AttentionCase, PackedAttentionCase

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.skipif(
    not hasattr(torch_attention, "register_flash_attention_impl"), reason="this torch takes no other implementation"
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Activated; the names of our functions that have served a call."""
    served: list[str] = []

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found = function(*args, **kwargs)
            if found is not None:
                served.append(name)
            return found

        return call

    for name in ("cpu_forward", "cpu_backward"):
        monkeypatch.setattr(torch_sdpa, name, counting(name, getattr(torch_sdpa, name)))
    torch_attention.activate_flash_attention_impl("torchweld")
    yield served
    if torch_attention.current_flash_attention_impl() is not None:
        torch_attention.restore_flash_attention_impl()


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def gradients(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> list[Tensor]:
    out = F.scaled_dot_product_attention(q, k, v, *args, **options)
    return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_known_but_not_active() -> None:
    assert "torchweld" in torch_attention.list_flash_attention_impls()
    assert torch_attention.current_flash_attention_impl() is None


# What torch's users can ask of its flash kernel, with rows enough for ours to be asked.
_PLAIN = [
    case
    for case in ATTENTION
    if isinstance(case, AttentionCase)
    and not isinstance(case, PackedAttentionCase)
    and not (case.softcap or case.sinks or case.lse or case.unseen_nan or case.masks or case.dropout)
    and not (case.bias or case.alibi or case.value_dim)
    and case.queries >= 64
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", _PLAIN, ids=lambda case: case.name)
def test_parity(case: AttentionCase, dtype: torch.dtype, calls: list[str]) -> None:
    """The very call of torch's function, held to torch's own kernel."""
    torch_attention.restore_flash_attention_impl()
    oracle = Oracle(case, dtype)
    torch_attention.activate_flash_attention_impl("torchweld")
    oracle.check(case.torch)
    assert {"cpu_forward", "cpu_backward"} == set(calls)


MASKS = {
    "boolean": lambda: torch.rand(70, 90) > 0.3,
    "boolean by key": lambda: torch.rand(2, 1, 1, 90) > 0.3,
    "additive": lambda: torch.randn(1, 4, 70, 90),
    "rows that see nothing": lambda: (torch.arange(70) % 3 > 0).unsqueeze(1).expand(70, 90),
}


@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str, calls: list[str]) -> None:
    given, qkv = MASKS[mask](), tensors((2, 4, 70, 16), (2, 4, 90, 16), (2, 4, 90, 16))
    found = gradients(*qkv, given, scale=0.3)
    assert calls == ["cpu_forward", "cpu_backward"]
    torch_attention.restore_flash_attention_impl()
    for got, want in zip(found, gradients(*qkv, given, scale=0.3), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


def test_grouped_queries(calls: list[str]) -> None:
    qkv = tensors((2, 8, 70, 16), (2, 2, 90, 16), (2, 2, 90, 16))
    found = gradients(*qkv, enable_gqa=True)
    torch_attention.restore_flash_attention_impl()
    for got, want in zip(found, gradients(*qkv, enable_gqa=True), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


def test_restored_to_the_same_bits(calls: list[str]) -> None:
    qkv = tensors(*3 * [(1, 2, 70, 16)])
    ours = gradients(*qkv)
    torch_attention.restore_flash_attention_impl()
    torchs = gradients(*qkv)
    assert len(calls) == 2 and not same(ours, torchs)
    torch_attention.activate_flash_attention_impl("torchweld")
    assert torch_attention.current_flash_attention_impl() == "torchweld"
    torch_attention.activate_flash_attention_impl("torchweld")  # once more: the first is put back before
    assert same(gradients(*qkv), ours)
    torch_attention.restore_flash_attention_impl()
    assert same(gradients(*qkv), torchs) and torch_attention.current_flash_attention_impl() is None


LEFT_ALONE: dict[str, tuple[list[Tensor], dict[str, Any]]] = {
    "float64": (tensors(*3 * [(1, 2, 70, 16)], dtype=torch.float64), {}),
    "a few queries": (tensors((1, 2, 3, 16), (1, 2, 70, 16), (1, 2, 70, 16)), {}),
    "dropout": (tensors(*3 * [(1, 2, 70, 16)]), {"dropout_p": 0.5}),
    "a mask that learns": (tensors(*3 * [(1, 2, 70, 16)]), {"attn_mask": torch.randn(70, 70, requires_grad=True)}),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_the_rest_is_torchs_own(name: str, calls: list[str]) -> None:
    qkv, options = LEFT_ALONE[name]
    torch.manual_seed(1)
    found = gradients(*qkv, **options)
    torch_attention.restore_flash_attention_impl()
    torch.manual_seed(1)
    assert same(found, gradients(*qkv, **options)) and not calls


def test_the_reference_stands_for_torchs_own(calls: list[str]) -> None:
    qkv = tensors(*3 * [(1, 2, 70, 16)])
    with backend.use_backend("reference"):
        found = gradients(*qkv)
    torch_attention.restore_flash_attention_impl()
    assert same(found, gradients(*qkv)) and not calls


@pytest.mark.parametrize("first", ["torchweld", "torch"])
def test_forward_and_backward_may_meet_unlike_kernels(first: str, calls: list[str]) -> None:
    """Activated or restored between them; a row that sees nothing must not turn into NaN."""
    q, k, v = tensors(*3 * [(1, 2, 70, 16)])
    mask = MASKS["rows that see nothing"]()[:, :70]
    if first == "torch":
        torch_attention.restore_flash_attention_impl()
    out = F.scaled_dot_product_attention(q, k, v, mask)
    if first == "torch":
        torch_attention.activate_flash_attention_impl("torchweld")
    else:
        torch_attention.restore_flash_attention_impl()
    found = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert calls == (["cpu_backward"] if first == "torch" else ["cpu_forward"])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for got, want in zip(found, gradients(q, k, v, mask)[1:], strict=True):
            torch.testing.assert_close(got, want.nan_to_num(0.0), rtol=1e-4, atol=2e-5)


def test_an_unchanged_model_trains(calls: list[str]) -> None:
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    x = torch.randn(2, 70, 32)

    def step() -> list[Tensor]:
        layer.zero_grad()
        loss = layer(x).square().mean()
        loss.backward()
        return [loss, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]

    found = step()
    assert calls == ["cpu_forward", "cpu_backward"]
    torch_attention.restore_flash_attention_impl()
    for got, want in zip(found, step(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_compiled_code_takes_what_is_active(calls: list[str]) -> None:
    compiled = torch.compile(gradients, backend="aot_eager")
    qkv = tensors(*3 * [(1, 2, 70, 16)])
    for got, want in zip(compiled(*qkv), gradients(*qkv), strict=True):
        torch.testing.assert_close(got, want)
    assert calls == 2 * ["cpu_forward", "cpu_backward"]


@pytest.mark.cuda
@pytest.mark.skipif(backend.unavailable("cuda") is not None, reason="needs an NVIDIA GPU and torchweld._cuda")
@pytest.mark.parametrize("is_causal", [False, True])
def test_on_a_gpu(is_causal: bool) -> None:
    """Under sdpa_kernel(FLASH_ATTENTION), which refuses to take anything else."""
    qkv = [torch.randn(2, 4, 300, 64, device="cuda").bfloat16().requires_grad_() for _ in range(3)]
    with torch_attention.sdpa_kernel(torch_attention.SDPBackend.FLASH_ATTENTION):
        torchs = gradients(*qkv, is_causal=is_causal)
        torch_attention.activate_flash_attention_impl("torchweld")
        try:
            ours = gradients(*qkv, is_causal=is_causal)
        finally:
            torch_attention.restore_flash_attention_impl()
        assert same(gradients(*qkv, is_causal=is_causal)[:1], torchs[:1]) and not same(ours, torchs)
    for got, want in zip(ours, torchs, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
