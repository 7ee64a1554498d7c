"""GPT-2: a decoder-only transformer with learned positions, pre-norm blocks and tied embeddings.

Radford et al., "Language Models are Unsupervised Multitask Learners" (2019). Parameters carry the published names
(`wte`, `wpe`, `h.0.attn.c_attn`, ... `ln_f`). Dimensions: B batch, N tokens, C = n_embd, H heads, D = C / H, and
V = vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchweld.ops
from torchweld.errors import UserError
from torchweld.models.decoding import Decoder, KVCache
from torchweld.models.layers import Dropout, Norm, split_heads
from torchweld.models.published import check_config, check_heads, check_sizes

SIZES = ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head"]


@dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2; the names are those of Hugging Face's `config.json`."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    layer_norm_epsilon: float = 1e-5
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_sizes(self, SIZES)
        check_heads(self, "n_embd", "n_head")

    @classmethod
    def from_hugging_face(cls, values: Mapping[str, Any]) -> GPT2Config:
        """From the contents of a GPT-2 `config.json`.

        Raises:
            UserError: another model type, or a variant of GPT-2 that this file does not implement.
        """
        width = values.get("n_embd")
        expected: dict[str, list[Any]] = {
            "model_type": ["gpt2"],
            "activation_function": ["gelu_new", None],
            "n_inner": [None, 4 * width if isinstance(width, int) else None],
            "scale_attn_weights": [True, None],
            "scale_attn_by_inverse_layer_idx": [False, None],
            "tie_word_embeddings": [True, None],
        }
        check_config("GPT-2", values, expected, SIZES)
        return cls(
            **{name: values[name] for name in SIZES},
            layer_norm_epsilon=values.get("layer_norm_epsilon", 1e-5),
            dropout=values.get("resid_pdrop", 0.0),
        )

    def to_hugging_face(self) -> dict[str, Any]:
        """The contents of the `config.json` that `transformers` reads."""
        return {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "activation_function": "gelu_new",
            "vocab_size": self.vocab_size,
            "n_positions": self.n_positions,
            "n_embd": self.n_embd,
            "n_layer": self.n_layer,
            "n_head": self.n_head,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "resid_pdrop": self.dropout,
            "embd_pdrop": self.dropout,
            "attn_pdrop": self.dropout,
        }


CONFIGS = {
    "tiny": GPT2Config(vocab_size=512, n_positions=64, n_embd=64, n_layer=2, n_head=2),
    "small": GPT2Config(vocab_size=4096, n_positions=256, n_embd=192, n_layer=4, n_head=3),
    "medium": GPT2Config(vocab_size=4096, n_positions=512, n_embd=384, n_layer=6, n_head=6),
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
}


class Attention(nn.Module):
    """Causal attention over all tokens before."""

    def __init__(self, config: GPT2Config, ops: ModuleType, layer: int, bias: bool = True) -> None:
        super().__init__()
        self.head_size, self.dropout, self.layer = config.n_embd // config.n_head, config.dropout, layer
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.scaled_dot_product_attention = ops.scaled_dot_product_attention

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        q, k, v = split_heads(self.c_attn(x), 3, self.head_size).permute(2, 0, 3, 1, 4)  # each (B, H, N, D), a view
        past = 0
        if cache is not None:
            past = cache.length
            k, v = cache.extend(self.layer, k, v)
        y = self.attend(q, k, v, past)
        return self.c_proj(y.transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, past: int) -> Tensor:
        """q (B, H, N, D), k and v (B, H, past + N, D) -> (B, H, N, D)."""
        mask, N = None, q.shape[2]
        if past and N > 1:  # query i stands at position past + i, which torch's top-left causal mask cannot say
            mask = torch.ones(N, past + N, dtype=torch.bool, device=q.device).tril(past)
        dropout = self.dropout if self.training else 0.0
        return self.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=past == 0)


class MLP(nn.Module):
    def __init__(self, config: GPT2Config, ops: ModuleType) -> None:
        super().__init__()
        self.gelu = ops.gelu
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return self.c_proj(self.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: GPT2Config, ops: ModuleType, attention: Attention) -> None:
        super().__init__()
        self.ln_1 = Norm(config.n_embd, config.layer_norm_epsilon, ops)
        self.attn = attention
        self.ln_2 = Norm(config.n_embd, config.layer_norm_epsilon, ops)
        self.mlp = MLP(config, ops)
        self.drop = Dropout(config.dropout, ops)

    def forward(self, x: Tensor, residual: Tensor | None, cache: KVCache | None) -> tuple[Tensor, Tensor]:
        """Takes and returns (a contribution not added yet, the stream), so that each add is done inside a norm."""
        x, residual = self.ln_1(x, residual)
        x, residual = self.ln_2(self.drop(self.attn(x, cache)), residual)
        return self.drop(self.mlp(x)), residual


class GPT2(Decoder):
    """GPT-2 on the functions of `ops`: `torchweld.ops`, or `torchweld.models.stock` for stock PyTorch."""

    title, prefix, tied = "GPT-2", "transformer.", {"lm_head.weight": "wte.weight"}
    ignored = (".attn.bias", ".attn.masked_bias")

    def __init__(self, config: GPT2Config, ops: ModuleType = torchweld.ops) -> None:
        super().__init__()
        self.config = config
        self.linear_cross_entropy = ops.linear_cross_entropy
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = Dropout(config.dropout, ops)
        self.h = nn.ModuleList(Block(config, ops, self.attention(ops, layer)) for layer in range(config.n_layer))
        self.ln_f = Norm(config.n_embd, config.layer_norm_epsilon, ops)
        self.initialise()

    def attention(self, ops: ModuleType, layer: int) -> Attention:
        """That of a block."""
        return Attention(self.config, ops, layer)

    @torch.no_grad()
    def initialise(self) -> None:
        """GPT-2's: normal with 0.02, and less for the 2 x n_layer layers whose outputs add up in the stream."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif p.dim() > 1:
                p.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer) if "c_proj" in name else 0.02)

    def hidden(self, tokens: Tensor, cache: KVCache | None = None, positions: Tensor | None = None) -> Tensor:
        """tokens: (B, N) of int64. Returns the final normed stream, (B, N, C).

        `positions` (N): where the tokens stand in a sequence of which they are a part; without a cache.
        """
        start = cache.length if cache is not None else 0
        end, limit = start + tokens.shape[1], self.config.n_positions
        if end > limit:
            raise UserError(f"{type(self).__name__}: expected at most n_positions = {limit} tokens, but got {end}")
        places = self.wpe.weight[start:end] if positions is None else self.wpe(positions)
        x = self.drop(self.wte(tokens) + places)
        residual = None
        for block in self.h:
            x, residual = block(x, residual, cache)
        if cache is not None:
            cache.length = end
        return self.ln_f(x, residual)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Of the token that follows each position: (..., C) -> (..., V)."""
        return F.linear(hidden, self.wte.weight)

    def forward(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        targets: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Logits of the token that follows each one: (B, N) -> (B, N, V). `cache` holds the tokens before, if any.

        With `targets` (B, N) it returns the mean loss, and the logits are never in memory.
        """
        hidden = self.hidden(tokens, cache, positions)
        if targets is None:
            return self.logits(hidden)
        loss: Tensor = self.linear_cross_entropy(hidden, self.wte.weight, targets)
        return loss

    def loss(self, tokens: Tensor, targets: Tensor, positions: Tensor | None = None) -> Tensor:
        """The mean cross-entropy in nats of `targets` (B, N) after `tokens` (B, N); `positions` as in `hidden`."""
        loss: Tensor = self(tokens, targets=targets, positions=positions)  # by the call, which hooks see
        return loss

    def published(self) -> dict[str, Tensor]:
        """The parameters by their published names; the weights of linear layers are stored (in, out)."""
        return {name: _transposed(name, p.detach()) for name, p in self.state_dict().items()}

    def load_published(self, stored: Mapping[str, Tensor]) -> None:
        """The inverse of `published`."""
        self.load_state_dict({name: _transposed(name, tensor) for name, tensor in stored.items()})


def _transposed(name: str, tensor: Tensor) -> Tensor:
    """Between nn.Linear's weight (out, in) and that of the published checkpoints (in, out); others as they are."""
    linear = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    return tensor.t() if linear and tensor.dim() == 2 else tensor
