"""GPT-3: GPT-2 whose layers are in turn dense and banded, so that every second one reads a window of the last tokens.

Brown et al., "Language Models are Few-Shot Learners", arXiv:2005.14165, section 2.1; the bands are those of Child et
al., arXiv:1904.10509, without strides. Weights go to and from GPT-Neo, the published model of this kind: no bias in the
layers that make queries, keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from torchweld.models.gpt2 import GPT2, Attention, GPT2Config
from torchweld.models.published import check_config, check_sizes

# Ours and GPT-Neo's names of the same sizes.
_SIZES = {
    "vocab_size": "vocab_size",
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "window": "window_size",
}


@dataclass(frozen=True)
class GPT3Config(GPT2Config):
    """The shape of a GPT-3. `window`: how many tokens a banded layer sees, the current one included."""

    n_positions: int = 2048
    window: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, ["window"])

    def banded(self, layer: int) -> bool:
        """Whether a layer sees a window alone: every second one."""
        return layer % 2 == 1

    @classmethod
    def from_hugging_face(cls, values: Mapping[str, Any]) -> GPT3Config:
        """From the contents of a GPT-Neo `config.json`.

        Raises:
            UserError: another model type, or a variant of GPT-Neo that this file does not implement.
        """
        check_config("GPT-Neo", values, {"model_type": ["gpt_neo"]}, [*_SIZES.values(), "attention_types"])
        config = cls(
            **{ours: values[theirs] for ours, theirs in _SIZES.items()},
            layer_norm_epsilon=values.get("layer_norm_epsilon", 1e-5),
            dropout=values.get("resid_dropout", 0.0),
        )
        expected: dict[str, list[Any]] = {
            "activation_function": ["gelu_new", None],
            "intermediate_size": [None, 4 * config.n_embd],
            "tie_word_embeddings": [True, None],
            "attention_layers": [_layers(config.attention_types)],
        }
        check_config("GPT-3", {**values, "attention_layers": _layers(values["attention_types"])}, expected, [])
        return config

    @property
    def attention_types(self) -> list[list[Any]]:
        """As GPT-Neo's `config.json` has them: kinds of layers in turn, and how often."""
        pairs = [[["global", "local"], self.n_layer // 2]] if self.n_layer > 1 else []
        return pairs + ([[["global"], 1]] if self.n_layer % 2 else [])

    def to_hugging_face(self) -> dict[str, Any]:
        """The contents of the `config.json` that `transformers` reads."""
        return {
            "model_type": "gpt_neo",
            "architectures": ["GPTNeoForCausalLM"],
            "activation_function": "gelu_new",
            **{theirs: getattr(self, ours) for ours, theirs in _SIZES.items()},
            "attention_types": self.attention_types,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "resid_dropout": self.dropout,
            "embed_dropout": self.dropout,
            "attention_dropout": self.dropout,
        }


def _layers(types: Any) -> list[str] | None:
    """The kind of each layer; None where `types` are not GPT-Neo's."""
    try:
        return [kind for kinds, count in types for _ in range(count) for kind in kinds]
    except (TypeError, ValueError):
        return None


# "gpt3-small" and above: table 2.1 of the paper, whose heads do not always divide the width: XL has 24 heads of 128 in
# 2048 there, 13B is 5140 wide.
CONFIGS = {
    "tiny": GPT3Config(vocab_size=512, n_positions=64, n_embd=64, n_layer=2, n_head=2, window=16),
    "small": GPT3Config(vocab_size=4096, n_positions=256, n_embd=192, n_layer=4, n_head=3, window=64),
    "long": GPT3Config(vocab_size=4096, n_positions=2048, n_embd=192, n_layer=4, n_head=3),
    "gpt3-small": GPT3Config(),
    "gpt3-medium": GPT3Config(n_embd=1024, n_layer=24, n_head=16),
    "gpt3-large": GPT3Config(n_embd=1536, n_layer=24, n_head=16),
    "gpt3-xl": GPT3Config(n_embd=2048, n_layer=24, n_head=16),
    "gpt3-2.7b": GPT3Config(n_embd=2560, n_layer=32, n_head=32),
    "gpt3-6.7b": GPT3Config(n_embd=4096, n_layer=32, n_head=32),
    "gpt3-13b": GPT3Config(n_embd=5120, n_layer=40, n_head=40),
    "gpt3-175b": GPT3Config(n_embd=12288, n_layer=96, n_head=96),
}


class BandedAttention(Attention):
    """Causal attention over the last `window` tokens."""

    def __init__(self, config: GPT3Config, ops: ModuleType, layer: int, bias: bool) -> None:
        super().__init__(config, ops, layer, bias)
        self.window, self.attention = config.window, ops.attention

    def attend(self, q: Tensor, k: Tensor, v: Tensor, past: int) -> Tensor:
        """q (B, H, N, D), k and v (B, H, past + N, D) -> (B, H, N, D)."""
        band = (self.window - 1, 0)
        dropout = self.dropout if self.training else 0.0
        return self.attention(q, k, v, causal=True, window=band, dropout_p=dropout, causal_align="bottom_right")


class GPT3(GPT2):
    """GPT-3 on the functions of `ops`: `torchweld.ops`, or `torchweld.models.stock` for stock PyTorch."""

    title = "GPT-Neo"
    ignored = (".attn.attention.bias", ".attn.attention.masked_bias")

    config: GPT3Config

    def attention(self, ops: ModuleType, layer: int) -> Attention:
        """That of a block."""
        kind = BandedAttention if self.config.banded(layer) else Attention
        return kind(self.config, ops, layer, bias=False)

    def published(self) -> dict[str, Tensor]:
        """The parameters as GPT-Neo has them: three matrices for queries, keys and values, scores without a scale."""
        stored = {}
        for name, p in self.state_dict().items():
            layer, _, own = name.rpartition(".attn.")
            if own == "c_attn.weight":
                q, k, v = p.detach().chunk(3)
                for kind, tensor in (("q", q * self._scale), ("k", k), ("v", v)):
                    stored[f"{layer}.attn.attention.{kind}_proj.weight"] = tensor
            else:
                stored[name.replace(".attn.c_proj.", ".attn.attention.out_proj.")] = p.detach()
        return stored

    def load_published(self, stored: Mapping[str, Tensor]) -> None:
        """The inverse of `published`."""
        own = {}
        for name, tensor in stored.items():
            layer, found, kind = name.rpartition(".attn.attention.")
            if kind == "q_proj.weight":
                k, v = (stored[f"{layer}.attn.attention.{other}_proj.weight"] for other in "kv")
                own[f"{layer}.attn.c_attn.weight"] = torch.cat([tensor / self._scale, k, v])
            elif not found or kind.startswith("out_proj."):
                own[name.replace(".attn.attention.out_proj.", ".attn.c_proj.")] = tensor
        self.load_state_dict(own)

    @property
    def _scale(self) -> float:
        """GPT-Neo's scores are q k^T as they are; what others divide by 1 / sqrt(D) is in its weights."""
        return 1.0 / math.sqrt(self.config.n_embd // self.config.n_head)
