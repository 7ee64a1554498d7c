"""AST: the spectrogram of a recording as a sequence of patches, which may overlap, read by a ViT's encoder.

Gong et al., "AST: Audio Spectrogram Transformer", arXiv:2104.01778. Weights go to and from `transformers`'
ASTForAudioClassification. Dimensions: B batch, spectrograms (T frames, M bands of mel), N patches + 2 tokens, C =
hidden_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import torchweld.ops
from torchweld.errors import UserError
from torchweld.models import vit
from torchweld.models.layers import Dropout, Norm
from torchweld.models.published import Published, check_config, check_heads, check_sizes

_SIZES = ["max_length", "num_mel_bins", "patch_size", "time_stride", "frequency_stride"]
_SIZES += ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
MODEL_TYPE = "audio-spectrogram-transformer"
_WHOLE = "audio_spectrogram_transformer."


@dataclass(frozen=True)
class ASTConfig:
    """The shape of an AST; the names are those of Hugging Face's `config.json`. `labels`: the names of the classes."""

    max_length: int = 1024
    num_mel_bins: int = 128
    patch_size: int = 16
    time_stride: int = 10
    frequency_stride: int = 10
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    layer_norm_eps: float = 1e-12
    dropout: float = 0.0
    labels: tuple[str, ...] = ("0", "1")

    def __post_init__(self) -> None:
        check_sizes(self, _SIZES)
        check_heads(self, "hidden_size", "num_attention_heads")
        if self.patch_size > (least := min(self.max_length, self.num_mel_bins)):
            raise UserError(f"ASTConfig: expected patch_size up to {least}, but got {self.patch_size}")

    @property
    def patches(self) -> int:
        """How many there are."""
        bands = (self.num_mel_bins - self.patch_size) // self.frequency_stride + 1
        return bands * ((self.max_length - self.patch_size) // self.time_stride + 1)

    @classmethod
    def from_hugging_face(cls, values: Mapping[str, Any]) -> ASTConfig:
        """From the contents of an AST `config.json`.

        Raises:
            UserError: another model type, a variant of AST that this file does not implement, or no labels.
        """
        expected: dict[str, list[Any]] = {
            "model_type": [MODEL_TYPE],
            "hidden_act": ["gelu", None],
            "qkv_bias": [True, None],
        }
        check_config("AST", values, expected, [*_SIZES, "id2label"])
        labels = values["id2label"]
        return cls(
            **{name: values[name] for name in _SIZES},
            layer_norm_eps=values.get("layer_norm_eps", 1e-12),
            dropout=values.get("hidden_dropout_prob", 0.0),
            labels=tuple(labels[key] for key in sorted(labels, key=int)),
        )

    def to_hugging_face(self) -> dict[str, Any]:
        """The contents of the `config.json` that `transformers` reads."""
        labels = dict(enumerate(self.labels))
        return {
            "model_type": MODEL_TYPE,
            "architectures": ["ASTForAudioClassification"],
            "hidden_act": "gelu",
            "qkv_bias": True,
            **{name: getattr(self, name) for name in _SIZES},
            "layer_norm_eps": self.layer_norm_eps,
            "hidden_dropout_prob": self.dropout,
            "attention_probs_dropout_prob": self.dropout,
            "id2label": labels,
            "label2id": {label: i for i, label in labels.items()},
        }


# 64 frames of 48 bands are a word; the published one reads 10 s.
_WORD = ASTConfig(max_length=64, num_mel_bins=48, time_stride=8, frequency_stride=8)
CONFIGS = {
    "tiny": replace(
        _WORD,
        time_stride=16,
        frequency_stride=16,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    ),
    "small": replace(_WORD, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256),
    "medium": replace(_WORD, hidden_size=256, num_hidden_layers=8, num_attention_heads=8, intermediate_size=1024),
    "ast-base": ASTConfig(max_length=64, num_mel_bins=48),
}


class AST(Published):
    """AST with its classifier on the functions of `ops`: `torchweld.ops`, or `torchweld.models.stock`."""

    title = "AST"

    def __init__(self, config: ASTConfig, ops: ModuleType = torchweld.ops) -> None:
        super().__init__()
        self.config = config
        width, eps = config.hidden_size, config.layer_norm_eps
        strides = (config.frequency_stride, config.time_stride)
        self.embed = nn.Conv2d(1, width, config.patch_size, stride=strides)
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.second = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 2 + config.patches, width))
        self.drop = Dropout(config.dropout, ops)
        self.layers = nn.ModuleList(vit.Layer(config, ops) for _ in range(config.num_hidden_layers))
        self.norm = Norm(width, eps, ops)
        self.head_norm = Norm(width, eps, ops)
        self.classifier = nn.Linear(width, len(config.labels))
        self.cross_entropy = ops.cross_entropy
        vit.initialise(self)

    def forward(self, spectrograms: Tensor) -> Tensor:
        """A logit for each label: (B, T, M) -> (B, labels)."""
        expected = (self.config.max_length, self.config.num_mel_bins)
        if spectrograms.shape[1:] != expected:
            raise UserError(f"AST: expected spectrograms of {list(expected)}, but got {list(spectrograms.shape[1:])}")
        patches = self.embed(spectrograms.transpose(1, 2)[:, None]).flatten(2).transpose(1, 2)
        leading = torch.cat([self.first, self.second], dim=1).to(patches.dtype).expand(len(patches), -1, -1)
        x, residual = self.drop(torch.cat([leading, patches], dim=1) + self.positions), None
        for layer in self.layers:
            x, residual = layer(x, residual)
        # The two leading tokens alone are read.
        x = self.norm(x[:, :2].contiguous(), None if residual is None else residual[:, :2].contiguous())[0]
        return self.classifier(self.head_norm(x.mean(1))[0])

    def loss(self, spectrograms: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy in nats of the labels' numbers (B)."""
        return self.cross_entropy(self(spectrograms), labels)

    def published_names(self, name: str) -> list[str]:
        """As in `Published`: queries, keys and values apart."""
        if name == "second":
            return [f"{_WHOLE}embeddings.distillation_token"]
        for ours, theirs in (("head_norm.", "classifier.layernorm."), ("classifier.", "classifier.dense.")):
            if name.startswith(ours):
                return [name.replace(ours, theirs)]
        return [each.replace("vit.", _WHOLE, 1) for each in vit.published_names(name)]
