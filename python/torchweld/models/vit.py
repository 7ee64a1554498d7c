"""ViT: an image as a sequence of patches, read by a transformer encoder with pre-norm blocks.

Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv:2010.11929. Weights go to and from `transformers`'
ViTForImageClassification. Dimensions: B batch, images (K, S, S), N = (S / patch_size)^2 + 1 tokens, C = hidden_size,
H heads, D = C / H.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import torchweld.ops
from torchweld.errors import UserError
from torchweld.models.layers import Dropout, Norm, split_heads
from torchweld.models.published import Published, check_config, check_heads, check_sizes

_SIZES = ["image_size", "patch_size", "num_channels"]
_SIZES += ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]


@dataclass(frozen=True)
class ViTConfig:
    """The shape of a ViT; the names are those of Hugging Face's `config.json`. `labels`: the names of the classes."""

    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
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
        if self.image_size % self.patch_size:
            raise UserError(
                f"ViTConfig: expected image_size divisible by patch_size, but got {self.image_size} and "
                f"{self.patch_size}; pad or crop the images"
            )

    @property
    def patches(self) -> int:
        """How many there are."""
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_hugging_face(cls, values: Mapping[str, Any]) -> ViTConfig:
        """From the contents of a ViT `config.json`.

        Raises:
            UserError: another model type, a variant of ViT that this file does not implement, or no labels.
        """
        expected: dict[str, list[Any]] = {
            "model_type": ["vit"],
            "hidden_act": ["gelu", None],
            "qkv_bias": [True, None],
        }
        check_config("ViT", values, expected, [*_SIZES, "id2label"])
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
            "model_type": "vit",
            "architectures": ["ViTForImageClassification"],
            "hidden_act": "gelu",
            "qkv_bias": True,
            **{name: getattr(self, name) for name in _SIZES},
            "layer_norm_eps": self.layer_norm_eps,
            "hidden_dropout_prob": self.dropout,
            "attention_probs_dropout_prob": self.dropout,
            "id2label": labels,
            "label2id": {label: i for i, label in labels.items()},
        }


_DIGIT = ViTConfig(image_size=28, patch_size=4, num_channels=1)
CONFIGS = {
    "tiny": replace(_DIGIT, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64),
    "small": replace(_DIGIT, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256),
    "medium": ViTConfig(
        image_size=32,
        patch_size=4,
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=8,
        intermediate_size=1024,
    ),
    "vit-base": ViTConfig(),
    "vit-large": ViTConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
    "vit-huge": ViTConfig(
        patch_size=14, hidden_size=1280, num_hidden_layers=32, num_attention_heads=16, intermediate_size=5120
    ),
}


class Encoder(Protocol):
    """What a layer asks of a config."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def layer_norm_eps(self) -> float: ...
    @property
    def dropout(self) -> float: ...


class Layer(nn.Module):
    """Attention and an MLP; a norm stands before each."""

    def __init__(self, config: Encoder, ops: ModuleType) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.head_size, self.dropout = width // config.num_attention_heads, config.dropout
        self.attention, self.gelu = ops.scaled_dot_product_attention, ops.gelu
        self.norm_1 = Norm(width, eps, ops)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm_2 = Norm(width, eps, ops)
        self.up = nn.Linear(width, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, width)
        self.drop = Dropout(config.dropout, ops)

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Takes and returns (a contribution not added yet, the stream), so that each add is done inside a norm."""
        x, residual = self.norm_1(x, residual)
        q, k, v = split_heads(self.qkv(x), 3, self.head_size).permute(2, 0, 3, 1, 4)  # each (B, H, N, D), a view
        x = self.attention(q, k, v, None, self.dropout if self.training else 0.0)
        x, residual = self.norm_2(self.drop(self.proj(x.transpose(1, 2).flatten(2))), residual)
        return self.drop(self.down(self.gelu(self.up(x)))), residual


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """The authors': Glorot's for linear layers, LeCun's for patches; the classifier begins with zeros."""
    for name, p in model.named_parameters():
        if name.endswith("bias") or name in ("first", "second", "classifier.weight"):
            p.zero_()
        elif name == "positions":
            p.normal_(std=0.02)
        elif name == "embed.weight":
            p.normal_(std=p[0].numel() ** -0.5)
        elif p.dim() > 1:
            for part in p.chunk(3) if ".qkv." in name else [p]:
                nn.init.xavier_uniform_(part)


class ViT(Published):
    """ViT with its classifier on the functions of `ops`: `torchweld.ops`, or `torchweld.models.stock`."""

    title = "ViT"

    def __init__(self, config: ViTConfig, ops: ModuleType = torchweld.ops) -> None:
        super().__init__()
        self.config = config
        width, patch = config.hidden_size, config.patch_size
        self.embed = nn.Conv2d(config.num_channels, width, patch, stride=patch)
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + config.patches, width))
        self.drop = Dropout(config.dropout, ops)
        self.layers = nn.ModuleList(Layer(config, ops) for _ in range(config.num_hidden_layers))
        self.norm = Norm(width, config.layer_norm_eps, ops)
        self.classifier = nn.Linear(width, len(config.labels))
        self.cross_entropy = ops.cross_entropy
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """A logit for each label: (B, K, S, S) -> (B, labels)."""
        size, channels = self.config.image_size, self.config.num_channels
        if images.shape[1:] != (channels, size, size):
            raise UserError(f"ViT: expected images of {[channels, size, size]}, but got {list(images.shape[1:])}")
        patches = self.embed(images).flatten(2).transpose(1, 2)
        first = self.first.to(patches.dtype).expand(len(images), -1, -1)
        x, residual = self.drop(torch.cat([first, patches], dim=1) + self.positions), None
        for layer in self.layers:
            x, residual = layer(x, residual)
        # The first token alone is read.
        x = x[:, 0] if residual is None else self.norm(x[:, 0].contiguous(), residual[:, 0].contiguous())[0]
        return self.classifier(x)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy in nats of the labels' numbers (B)."""
        return self.cross_entropy(self(images), labels)

    def published_names(self, name: str) -> list[str]:
        """As in `Published`: queries, keys and values apart."""
        return published_names(name)


# Our names and the published ones; queries, keys and values aside.
_NAMES = [
    ("embed.", "vit.embeddings.patch_embeddings.projection."),
    ("first", "vit.embeddings.cls_token"),
    ("positions", "vit.embeddings.position_embeddings"),
    ("layers.", "vit.encoder.layer."),
    (".norm_1.", ".layernorm_before."),
    (".proj.", ".attention.output.dense."),
    (".norm_2.", ".layernorm_after."),
    (".up.", ".intermediate.dense."),
    (".down.", ".output.dense."),
    ("norm.", "vit.layernorm."),
]


def published_names(name: str) -> list[str]:
    """The published names of what one of our parameters holds."""
    for ours, theirs in _NAMES:
        if name.startswith(ours) or ours.startswith("."):
            name = name.replace(ours, theirs)
    kinds = ("query", "key", "value") if ".qkv." in name else ("",)
    return [name.replace(".qkv.", f".attention.attention.{kind}.") for kind in kinds]
