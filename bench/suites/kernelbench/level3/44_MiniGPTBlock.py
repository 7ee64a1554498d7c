"""Norms, causal attention and GELU by torchweld."""

import torch

import torchweld
from torchweld import ops


class Attention(torch.nn.Module):
    def __init__(self, width: int, heads: int, dropout: float, residual_dropout: float) -> None:
        super().__init__()
        self.c_attn = torch.nn.Linear(width, 3 * width)
        self.c_proj = torch.nn.Linear(width, width)
        self.heads, self.dropout = heads, dropout
        self.residual_dropout = torch.nn.Dropout(residual_dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, 2))
        dropout = self.dropout if self.training else 0.0
        out = ops.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropout)
        return self.residual_dropout(self.c_proj(out.transpose(1, 2).flatten(2)))


class ModelNew(torch.nn.Module):
    def __init__(self, width: int, heads: int, dropout: float, residual_dropout: float, longest: int) -> None:
        super().__init__()
        self.ln_1 = torchweld.nn.LayerNorm(width)
        self.attn = Attention(width, heads, dropout, residual_dropout)
        self.ln_2 = torchweld.nn.LayerNorm(width)
        self.c_fc = torch.nn.Linear(width, 4 * width)
        self.c_proj = torch.nn.Linear(4 * width, width)
        self.residual_dropout = torch.nn.Dropout(residual_dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        hidden = ops.gelu(self.c_fc(self.ln_2(x)), approximate="tanh")
        return x + self.residual_dropout(self.c_proj(hidden))
