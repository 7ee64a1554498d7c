"""What the tests of patch share: a model with something of everything that can be swapped."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.functional import scaled_dot_product_attention as sdpa

from leaves import gradient

WIDTH, HEADS = 16, 2


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(WIDTH, 3 * WIDTH)

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.qkv(x).unflatten(-1, (3, HEADS, -1)).movedim(-3, 0).transpose(-2, -3).unbind()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-2, -3).flatten(-2)


def helper(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return sdpa(q, k, v, is_causal=True)


class IndirectAttention(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return helper(*self.heads(x)).transpose(-2, -3).flatten(-2)


class Model(torch.nn.Module):
    """Something of everything that can be swapped."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 24, 0.0, "gelu", batch_first=True)
        self.attentions = torch.nn.ModuleList([Attention(), IndirectAttention()])
        self.mha = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.gelu = torch.nn.GELU("tanh")
        self.rms, self.norm = torch.nn.RMSNorm(WIDTH), torch.nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(x)
        for attention in self.attentions:
            x = x + attention(self.rms(x))
        return self.norm(self.gelu(self.mha(x, x, x, need_weights=False)[0]))


def results(model: torch.nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    x = torch.linspace(-2, 2, 2 * 7 * WIDTH).view(2, 7, WIDTH)
    out = model(x)
    out.square().sum().backward()
    return [out.detach(), *(gradient(p).clone() for p in model.parameters())]


def distance(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """The relative errors of tensors beside those in float64, added up."""
    return sum(float((a.double() - b).norm() / b.norm().clamp(min=1e-9)) for a, b in zip(found, exact, strict=True))
