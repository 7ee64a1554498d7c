"""A program may give torch's own names to the drop-ins: what they fall back on is then still torch's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from torchweld import nn, ops, optim
from torchweld.nn.twins import TWINS


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD"])
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"differentiable": True}], ids=str)
def test_optimizers(monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, bool]) -> None:
    stock, weights, grad = getattr(torch.optim, name), [torch.ones(3) for _ in range(2)], torch.ones(3)
    expected = stock(weights[:1], lr=0.1, **options)
    monkeypatch.setattr(torch.optim, name, getattr(optim, name))
    got = getattr(torch.optim, name)(weights[1:], lr=0.1, **options)
    for weight, optimizer in zip(weights, (expected, got), strict=True):
        weight.grad = grad
        optimizer.step()
    assert type(got) is getattr(optim, name) and not torch.equal(weights[0], torch.ones(3))
    torch.testing.assert_close(*weights)
    twin = type(got)(weights[1:], lr=0.1)
    twin.load_state_dict(got.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)  # float64 goes to the definitions
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "gelu", "cross_entropy", "scaled_dot_product_attention"])
def test_functions(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 4, 4, dtype=dtype)
    calls = {
        "layer_norm": [(x, (4,))],
        "rms_norm": [(x, (4,))],
        "gelu": [(x,), (x, "tanh")],
        "cross_entropy": [(x, torch.randint(3, (2, 4, 4))), (x, x.softmax(1))],
        "scaled_dot_product_attention": [(x, x, x)],
    }[name]
    keywords = [{"approximate": a[1]} if name == "gelu" and a[1:] else {} for a in calls]
    calls = [a[:1] if name == "gelu" else a for a in calls]
    expected = [getattr(F, name)(*a, **k) for a, k in zip(calls, keywords, strict=True)]
    monkeypatch.setattr(F, name, getattr(ops, name))
    got = [getattr(F, name)(*a, **k) for a, k in zip(calls, keywords, strict=True)]
    torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    for stock, ours in TWINS.items():
        monkeypatch.setattr(torch.nn, stock.__name__, ours)
    model = torch.nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True, norm_first=True)
    assert isinstance(model, nn.Transformer) and type(torch.nn.LayerNorm(8)) is nn.LayerNorm
    x = torch.randn(2, 5, 8)
    got = model(x, x)
    model.double()
    torch.testing.assert_close(got, model(x.double(), x.double()).float())
