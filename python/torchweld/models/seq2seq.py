"""An encoder-decoder transformer with learned positions, pre-norm blocks and tied embeddings, for translation.

Vaswani et al., "Attention Is All You Need", arXiv:1706.03762, in the form of mBART (Liu et al., arXiv:2001.08210) and
with its names. A batch is packed: B sequences one after another, without padding. Dimensions: S and T tokens
of all sources and of all targets, C = d_model, H heads, D = C / H, V = vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchweld.ops
from torchweld.errors import UserError
from torchweld.models.decoding import KVCache
from torchweld.models.layers import Dropout, Norm, split_heads
from torchweld.models.published import Published, check_config, check_heads, check_sizes
from torchweld.models.sequences import Packed, Padded, arrange, positions

BEGIN, PAD, END = 0, 1, 2
OFFSET = 2  # mBART's first position is the third row of the table
EPS = 1e-5
BIAS = "final_logits_bias"
KeysValues = tuple[Tensor, Tensor]
_SIZES = [
    *(
        "vocab_size",
        "d_model",
        "encoder_layers",
        "decoder_layers",
        "encoder_attention_heads",
        "decoder_attention_heads",
    ),
    *("encoder_ffn_dim", "decoder_ffn_dim", "max_position_embeddings"),
]


@dataclass(frozen=True)
class Seq2SeqConfig:
    """The shape of an encoder-decoder; the names are those of mBART's `config.json`.

    Attributes:
        decoder_start_token_id: the decoder's first input, of which it makes the first token; </s>.
    """

    vocab_size: int = 37000
    d_model: int = 512
    encoder_layers: int = 6
    decoder_layers: int = 6
    encoder_attention_heads: int = 8
    decoder_attention_heads: int = 8
    encoder_ffn_dim: int = 2048
    decoder_ffn_dim: int = 2048
    max_position_embeddings: int = 1024
    dropout: float = 0.0
    decoder_start_token_id: int = END

    def __post_init__(self) -> None:
        check_sizes(self, _SIZES)
        for heads in ("encoder_attention_heads", "decoder_attention_heads"):
            check_heads(self, "d_model", heads)

    @classmethod
    def from_hugging_face(cls, values: Mapping[str, Any]) -> Seq2SeqConfig:
        """From the contents of an mBART `config.json`.

        Raises:
            UserError: another model type, or a variant of mBART that this file does not implement.
        """
        expected: dict[str, list[Any]] = {
            "model_type": ["mbart"],
            "activation_function": ["gelu", None],
            "scale_embedding": [True],
            "tie_word_embeddings": [True, None],
            "eos_token_id": [END, None],
            "forced_bos_token_id": [None],
        }
        check_config("mBART", values, expected, _SIZES)
        start = values.get("decoder_start_token_id")
        return cls(
            **{name: values[name] for name in _SIZES},
            dropout=values.get("dropout", 0.0),
            decoder_start_token_id=END if start is None else start,
        )

    def to_hugging_face(self) -> dict[str, Any]:
        """The contents of the `config.json` that `transformers` reads."""
        return {
            "model_type": "mbart",
            "architectures": ["MBartForConditionalGeneration"],
            "is_encoder_decoder": True,
            "activation_function": "gelu",
            "scale_embedding": True,
            **{name: getattr(self, name) for name in _SIZES},
            "dropout": self.dropout,
            "bos_token_id": BEGIN,
            "pad_token_id": PAD,
            "eos_token_id": END,
            "decoder_start_token_id": self.decoder_start_token_id,
        }


CONFIGS = {
    "tiny": Seq2SeqConfig(512, 64, 2, 2, 2, 2, 256, 256, max_position_embeddings=64),
    "small": Seq2SeqConfig(3000, 128, 3, 2, 2, 2, 512, 512, max_position_embeddings=64),
    "medium": Seq2SeqConfig(8000, 256, 4, 3, 4, 4, 1024, 1024, max_position_embeddings=128),
    "transformer-base": Seq2SeqConfig(),
    "transformer-big": Seq2SeqConfig(37000, 1024, 6, 6, 16, 16, 4096, 4096),
    "mbart-large": Seq2SeqConfig(250027, 1024, 12, 12, 16, 16, 4096, 4096),
}


class Sources(NamedTuple):
    """The encoder's output: (S, C), or as `sequences` arranges it."""

    hidden: Tensor
    sequences: Any


class SelfAttention(nn.Module):
    """Of a sequence to itself; of a target to what comes before."""

    def __init__(self, config: Seq2SeqConfig, heads: int, ops: ModuleType, layer: int, causal: bool) -> None:
        super().__init__()
        self.head_size, self.layer, self.causal = config.d_model // heads, layer, causal
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)
        self.scaled_dot_product_attention = ops.scaled_dot_product_attention

    def forward(self, x: Tensor, sequences: Packed | Padded, cache: KVCache | None = None) -> Tensor:
        """(..., C) -> (..., C). With a cache x is one token of each sequence, after those in the cache."""
        q, k, v = split_heads(self.qkv(x), 3, self.head_size).unbind(-3)  # each (..., H, D), a view
        if cache is None:
            y = sequences.attend(q, k, v, causal=self.causal)
        else:
            q, k, v = (t.flatten(0, -3)[:, :, None] for t in (q, k, v))
            y = self.scaled_dot_product_attention(q, *cache.extend(self.layer, k, v))
        return self.out_proj(y.reshape(x.shape))


class CrossAttention(nn.Module):
    """Of a target to its source."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.head_size = config.d_model // config.decoder_attention_heads
        self.q_proj = nn.Linear(config.d_model, config.d_model)
        self.kv = nn.Linear(config.d_model, 2 * config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)

    def read(self, hidden: Tensor) -> KeysValues:
        """Of the encoder's output: (..., C) -> twice (..., H, D)."""
        keys, values = split_heads(self.kv(hidden), 2, self.head_size).unbind(-3)
        return keys, values

    def forward(self, x: Tensor, sequences: Any, sources: Any, read: KeysValues) -> Tensor:
        """(..., C) -> (..., C); `read`: of `sources`, which are arranged as `sequences` are."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_size))
        return self.out_proj(sequences.attend(q, *read, seen=sources).flatten(-2))


class Layer(nn.Module):
    """Takes and returns (a contribution not added yet, the stream), so that each add is done inside a norm."""

    def __init__(self, config: Seq2SeqConfig, ops: ModuleType, layer: int, decoder: bool = False) -> None:
        super().__init__()
        width, inner = config.d_model, config.decoder_ffn_dim if decoder else config.encoder_ffn_dim
        heads = config.decoder_attention_heads if decoder else config.encoder_attention_heads
        self.gelu = ops.gelu
        self.self_attn_layer_norm = Norm(width, EPS, ops)
        self.self_attn = SelfAttention(config, heads, ops, layer, causal=decoder)
        if decoder:
            self.encoder_attn_layer_norm = Norm(width, EPS, ops)
            self.encoder_attn = CrossAttention(config)
        self.final_layer_norm = Norm(width, EPS, ops)
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)
        self.drop = Dropout(config.dropout, ops)

    def forward(
        self, x: Tensor, residual: Tensor | None, sequences: Packed | Padded, sources: Any = None, state: Any = None
    ) -> tuple[Tensor, Tensor]:
        """(..., C) twice -> (..., C) twice. `sources`: what a decoder attends to; `state`: where its targets grow."""
        x, residual = self.self_attn_layer_norm(x, residual)
        x = self.drop(self.self_attn(x, sequences, state and state.cache))
        if sources is not None:
            x, residual = self.encoder_attn_layer_norm(x, residual)
            read = self.encoder_attn.read(sources.hidden) if state is None else state.read[self.self_attn.layer]
            x = self.drop(self.encoder_attn(x, sequences, sources.sequences, read))
        x, residual = self.final_layer_norm(x, residual)
        return self.drop(self.fc2(self.gelu(self.fc1(x)))), residual


class Stack(nn.Module):
    """The layers of the encoder or of the decoder, between a norm of what is embedded and one of what comes out."""

    def __init__(self, config: Seq2SeqConfig, ops: ModuleType, count: int, decoder: bool = False) -> None:
        super().__init__()
        self.embed_positions = nn.Embedding(config.max_position_embeddings + OFFSET, config.d_model)
        self.layernorm_embedding = Norm(config.d_model, EPS, ops)
        self.layers = nn.ModuleList(Layer(config, ops, layer, decoder) for layer in range(count))
        self.layer_norm = Norm(config.d_model, EPS, ops)
        self.drop = Dropout(config.dropout, ops)

    def forward(self, words: Tensor, at: Tensor, sequences: Packed | Padded, *others: Any) -> Tensor:
        """words (T, C) at positions (T) -> (..., C), in the arrangement of `sequences`."""
        embedded = words * math.sqrt(words.shape[-1]) + self.embed_positions(at + OFFSET)
        x, residual = sequences.spread(self.drop(self.layernorm_embedding(embedded)[0])), None
        for layer in self.layers:
            x, residual = layer(x, residual, sequences, *others)
        return self.layer_norm(x, residual)[0]


class Seq2Seq(Published):
    """The model on the functions of `ops`: `torchweld.ops`, or `torchweld.models.stock` for stock PyTorch.

    As `transformers`' MBartForConditionalGeneration.
    """

    title, prefix = "mBART", "model."
    tied = dict.fromkeys(
        ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), "shared.weight"
    )

    def __init__(self, config: Seq2SeqConfig, ops: ModuleType = torchweld.ops) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, ops, config.encoder_layers)
        self.decoder = Stack(config, ops, config.decoder_layers, decoder=True)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """The paper's: embeddings of length 1, linear layers after Glorot, biases zero."""
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(std=self.config.d_model**-0.5)
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                module.bias.zero_()

    def encode(self, tokens: Tensor, cu_seqlens: Tensor) -> Sources:
        """tokens (S) of int64, each sequence closed by </s>; cu_seqlens (B + 1) of int32, where each starts, and S."""
        sequences = arrange(cu_seqlens, self.ops)
        return Sources(self.encoder(self.shared(tokens), self._positions(cu_seqlens), sequences), sequences)

    def hidden(self, tokens: Tensor, cu_seqlens: Tensor, sources: Sources) -> Tensor:
        """The decoder's output for inputs (T), which begin with the start token: (T, C)."""
        sequences = arrange(cu_seqlens, self.ops)
        x = self.decoder(self.shared(tokens), self._positions(cu_seqlens), sequences, sources)
        return sequences.gather(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Of the token that follows each input: (..., C) -> (..., V)."""
        return F.linear(hidden, self.shared.weight)

    def forward(self, source: Tensor, source_bounds: Tensor, inputs: Tensor, bounds: Tensor) -> Tensor:
        """Logits of the token that follows each input of the decoder: (S) and (T) -> (T, V)."""
        return self.logits(self.hidden(inputs, bounds, self.encode(source, source_bounds)))

    def loss(
        self, source: Tensor, source_bounds: Tensor, inputs: Tensor, bounds: Tensor, targets: Tensor, smoothing: float
    ) -> Tensor:
        """The mean cross-entropy in nats of `targets` (T), which follow `inputs` (T); `smoothing`: of the labels."""
        hidden = self.hidden(inputs, bounds, self.encode(source, source_bounds))
        return self.ops.linear_cross_entropy(hidden, self.shared.weight, targets, label_smoothing=smoothing)

    def _positions(self, cu_seqlens: Tensor) -> Tensor:
        at, limit = positions(cu_seqlens), self.config.max_position_embeddings
        if (longest := int(at.max()) + 1) > limit:
            raise UserError(f"Seq2Seq: expected at most max_position_embeddings = {limit} tokens, but got {longest}")
        return at

    def published_names(self, name: str) -> list[str]:
        """As in `Published`: queries, keys and values apart."""
        return _published_names(name)

    def to_hugging_face(self) -> dict[str, Tensor]:
        """As in `Published`, with the bias of the logits, which is zero."""
        return {**super().to_hugging_face(), BIAS: torch.zeros(1, self.config.vocab_size)}

    def load_hugging_face(self, state: Mapping[str, Tensor]) -> None:
        """As in `Published`; a bias of the logits must be zero."""
        if BIAS in state and bool(state[BIAS].any()):
            raise UserError(f"mBART weights: {BIAS}: expected zeros, but got others; this model has no such bias")
        super().load_hugging_face({name: tensor for name, tensor in state.items() if name != BIAS})


def _published_names(name: str) -> list[str]:
    """The published names of what one of our parameters holds."""
    for fused, kinds in ((".qkv.", "qkv"), (".kv.", "kv")):
        if fused in name:
            return [name.replace(fused, f".{kind}_proj.") for kind in kinds]
    return [name]
