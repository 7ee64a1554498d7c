"""GPT-2: a decoder-only transformer with learned positions, pre-norm blocks and tied embeddings.

Radford et al., "Language Models are Unsupervised Multitask Learners" (2019). Parameters carry the published names
(`wte`, `wpe`, `h.0.attn.c_attn`, ... `ln_f`). Dimensions: B batch, N tokens, C = n_embd, H heads, D = C / H, and
V = vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchweld.ops
from torchweld.errors import UserError


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
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"GPT2Config: {name}: expected a positive whole number, but got {value!r}")
        if self.n_embd % self.n_head:
            raise UserError(f"GPT2Config: expected n_embd divisible by n_head, but got {self.n_embd} and {self.n_head}")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"GPT2Config: dropout: expected a number in [0, 1), but got {self.dropout!r}")

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
        for name, allowed in expected.items():
            if (got := values.get(name)) not in allowed:
                raise UserError(f"config.json: {name}: expected {allowed[0]!r} (a GPT-2), but got {got!r}")
        names = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
        if missing := [name for name in names if name not in values]:
            raise UserError(f"config.json: expected the keys {', '.join(names)}, but {', '.join(missing)} is missing")
        return cls(
            **{name: values[name] for name in names},
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


class KVCache:
    """The keys and values of the tokens seen so far, for every layer: 2 x n_layer tensors (B, H, n_positions, D)."""

    def __init__(self, config: GPT2Config, batch: int, like: Tensor) -> None:
        shape = (batch, config.n_head, config.n_positions, config.n_embd // config.n_head)
        self.keys = [like.new_empty(shape) for _ in range(config.n_layer)]
        self.values = [like.new_empty(shape) for _ in range(config.n_layer)]
        self.length = 0

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Appends (B, H, N, D); returns views of all tokens so far, (B, H, length + N, D)."""
        end = self.length + key.shape[2]
        self.keys[layer][:, :, self.length : end] = key
        self.values[layer][:, :, self.length : end] = value
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


class Norm(nn.Module):
    """Layer norm, with the residual add in front of it."""

    def __init__(self, config: GPT2Config, ops: ModuleType) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd))
        self.eps = config.layer_norm_epsilon
        self.layer_norm, self.add_layer_norm = ops.layer_norm, ops.add_layer_norm

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, N, C): what is added to the stream `residual`, or its beginning. Returns (normed, the new stream)."""
        args = self.weight.shape, self.weight, self.bias, self.eps
        if residual is None:
            return self.layer_norm(x, *args), x
        # Under autocast a layer gives bfloat16; the stream stays float32, where small contributions are not lost.
        return self.add_layer_norm(x.to(residual.dtype), residual, *args)


class Attention(nn.Module):
    def __init__(self, config: GPT2Config, ops: ModuleType, layer: int) -> None:
        super().__init__()
        self.n_head, self.dropout, self.layer = config.n_head, config.dropout, layer
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.attend = ops.scaled_dot_product_attention

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        B, N, C = x.shape
        q, k, v = self.c_attn(x).view(B, N, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # each (B, H, N, D), a view
        mask, past = None, 0
        if cache is not None:
            past = cache.length
            k, v = cache.extend(self.layer, k, v)
            if past and N > 1:  # query i stands at position past + i, which torch's top-left causal mask cannot say
                mask = torch.ones(N, past + N, dtype=torch.bool, device=x.device).tril(past)
        dropout = self.dropout if self.training else 0.0
        y = self.attend(q, k, v, mask, dropout, is_causal=past == 0)
        return self.c_proj(y.transpose(1, 2).reshape(B, N, C))


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
    def __init__(self, config: GPT2Config, ops: ModuleType, layer: int) -> None:
        super().__init__()
        self.ln_1 = Norm(config, ops)
        self.attn = Attention(config, ops, layer)
        self.ln_2 = Norm(config, ops)
        self.mlp = MLP(config, ops)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, residual: Tensor | None, cache: KVCache | None) -> tuple[Tensor, Tensor]:
        """Takes and returns (a contribution not added yet, the stream), so that each add is done inside a norm."""
        x, residual = self.ln_1(x, residual)
        x, residual = self.ln_2(self.drop(self.attn(x, cache)), residual)
        return self.drop(self.mlp(x)), residual


class GPT2(nn.Module):
    """GPT-2 on the functions of `ops`: `torchweld.ops`, or `torchweld.models.stock` for stock PyTorch."""

    def __init__(self, config: GPT2Config, ops: ModuleType = torchweld.ops) -> None:
        super().__init__()
        self.config = config
        self.linear_cross_entropy = ops.linear_cross_entropy
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, ops, layer) for layer in range(config.n_layer))
        self.ln_f = Norm(config, ops)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """GPT-2's: normal with 0.02, and less for the 2 x n_layer layers whose outputs add up in the stream."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif p.dim() > 1:
                p.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer) if "c_proj" in name else 0.02)

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """tokens: (B, N) of int64. Returns the final normed stream, (B, N, C)."""
        start = cache.length if cache is not None else 0
        end = start + tokens.shape[1]
        if end > self.config.n_positions:
            raise UserError(f"GPT2: expected at most n_positions = {self.config.n_positions} tokens, but got {end}")
        x = self.drop(self.wte(tokens) + self.wpe.weight[start:end])
        residual = None
        for block in self.h:
            x, residual = block(x, residual, cache)
        if cache is not None:
            cache.length = end
        return self.ln_f(x, residual)[0]

    def forward(self, tokens: Tensor, cache: KVCache | None = None, targets: Tensor | None = None) -> Tensor:
        """Logits of the token that follows each one: (B, N) -> (B, N, V). `cache` holds the tokens before, if any.

        With `targets` (B, N) the loss, without the logits in memory.
        """
        x, head = self.hidden(tokens, cache), self.wte.weight
        logits_or_loss: Tensor = F.linear(x, head) if targets is None else self.linear_cross_entropy(x, head, targets)
        return logits_or_loss

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy in nats of `targets` (B, N) after `tokens` (B, N)."""
        loss: Tensor = self(tokens, targets=targets)  # by the call, which hooks see
        return loss

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """For an optimizer: matrices and embeddings decay, biases and norms do not."""
        decayed = [p for p in self.parameters() if p.dim() > 1]
        others = [p for p in self.parameters() if p.dim() <= 1]
        return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]

    def generate(self, tokens: Tensor, count: int, **sampling: Any) -> Tensor:
        """`tokens` (B, N) followed by `count` sampled ones: (B, N + count). `sampling`: as in `stream`."""
        return torch.cat([tokens, *(t[:, None] for t in islice(self.stream(tokens, **sampling), count))], dim=1)

    @torch.no_grad()
    def stream(
        self,
        tokens: Tensor,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        use_cache: bool = True,
    ) -> Iterator[Tensor]:
        """Samples one token after another, without end; the model must be in evaluation mode.

        When the context is full, the older half of it is forgotten, so that the text can be of any length.

        Args:
            tokens: (B, N) of int64, N >= 1.
            temperature: the logits are divided by it; 0 takes the likeliest token.
            top_k: only the k likeliest tokens.
            top_p: only the likeliest tokens that together reach this probability.
            seed: of the draws; None for torch's own random state.
            use_cache: keep keys and values, instead of running the whole context for each token.

        Yields:
            The next token of each sequence, (B).
        """
        check_sampling(tokens, temperature, top_k, top_p)
        generator = None if seed is None else torch.Generator(tokens.device).manual_seed(seed)
        limit = self.config.n_positions
        context, cache = tokens[:, -limit:], None
        fresh = context  # the tokens that the cache has not seen
        while True:
            if use_cache and cache is None:
                cache = KVCache(self.config, tokens.shape[0], self.wte.weight)
            last = self.hidden(fresh if use_cache else context, cache)[:, -1]
            token = sample(F.linear(last, self.wte.weight), temperature, top_k, top_p, generator)
            yield token
            fresh = token[:, None]
            if context.shape[1] == limit:
                cache = None
                fresh = context = torch.cat([context[:, limit - limit // 2 :], fresh], dim=1)
            else:
                context = torch.cat([context, fresh], dim=1)

    def load_hugging_face(self, state: Mapping[str, Tensor]) -> None:
        """Loads the state_dict of a `transformers` GPT2LMHeadModel or GPT2Model, or of a published checkpoint.

        Raises:
            UserError: a parameter is missing, unknown or of another shape.
        """
        stored = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
        stored = {name: t for name, t in stored.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}
        head = stored.pop("lm_head.weight", None)
        own = self.state_dict()
        if missing := sorted(own.keys() - stored.keys()):
            raise UserError(f"GPT-2 weights: expected {len(own)} tensors, but {missing[0]!r} is missing")
        if unknown := sorted(stored.keys() - own.keys()):
            raise UserError(f"GPT-2 weights: expected {len(own)} tensors, but {unknown[0]!r} is not one of them")
        stored = {name: _transposed(name, stored[name]) for name in own}
        for name, parameter in own.items():
            if stored[name].shape != parameter.shape:
                shapes = [list(_transposed(name, t).shape) for t in (parameter, stored[name])]
                raise UserError(
                    f"GPT-2 weights: {name}: expected shape {shapes[0]}, but got {shapes[1]}; "
                    f"the config belongs to another model"
                )
        if head is not None and not torch.equal(head, stored["wte.weight"]):
            raise UserError("GPT-2 weights: lm_head.weight: expected it tied to wte.weight, but it differs")
        self.load_state_dict(stored)

    def to_hugging_face(self) -> dict[str, Tensor]:
        """The state_dict that `transformers` and `load_hugging_face` read; tensors share memory with the model's."""
        return {f"transformer.{name}": _transposed(name, p.detach()) for name, p in self.state_dict().items()}


def _transposed(name: str, tensor: Tensor) -> Tensor:
    """Between nn.Linear's weight (out, in) and that of the published checkpoints (in, out); others as they are."""
    linear = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    return tensor.t() if linear and tensor.dim() == 2 else tensor


def check_sampling(tokens: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises UserError on arguments of `GPT2.stream` that have no meaning."""
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise UserError(f"generate: tokens: expected shape (batch, at least 1), but got {tuple(tokens.shape)}")
    if not 0.0 <= temperature < math.inf:
        raise UserError(f"generate: temperature: expected a finite number >= 0, but got {temperature}")
    if top_k is not None and top_k < 1:
        raise UserError(f"generate: top_k: expected at least 1, but got {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise UserError(f"generate: top_p: expected a number in (0, 1], but got {top_p}")


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Draws one token from each row: (B, V) -> (B)."""
    if temperature < 1e-6:  # also where the division below would overflow
        return logits.argmax(-1)
    # Sorted, "the k likeliest" and "the likeliest that reach p" are both a prefix.
    probabilities, order = (logits.float() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        probabilities[:, top_k:] = 0.0
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities
        probabilities[before >= top_p * probabilities.sum(-1, keepdim=True)] = 0.0
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(-1, drawn)[:, 0]
