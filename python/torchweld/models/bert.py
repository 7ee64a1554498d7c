"""BERT: a bidirectional transformer encoder with learned positions and post-norm blocks.

Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", arXiv:1810.04805. A
batch is packed: T tokens of B sequences one after another, without padding. Dimensions: C = hidden_size, H heads,
D = C / H, V = vocab_size. Weights go to and from the classes of `transformers` by the same names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchweld.ops
from torchweld.errors import UserError
from torchweld.models.layers import Dropout, Norm, split_heads
from torchweld.models.published import Published, check_config, check_heads, check_sizes
from torchweld.models.sequences import Packed, Padded, arrange, positions

_SIZES = [
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("max_position_embeddings", "type_vocab_size"),
]


@dataclass(frozen=True)
class BERTConfig:
    """The shape of a BERT; the names are those of Hugging Face's `config.json`.

    Attributes:
        labels: of a classifier; for regression the one name of what is predicted.
        regression: a classifier's logit is a number, and not one of the labels.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    dropout: float = 0.0
    labels: tuple[str, ...] = ()
    regression: bool = False

    def __post_init__(self) -> None:
        check_sizes(self, _SIZES)
        check_heads(self, "hidden_size", "num_attention_heads")

    @classmethod
    def from_hugging_face(cls, values: Mapping[str, Any]) -> BERTConfig:
        """From the contents of a BERT `config.json`.

        Raises:
            UserError: another model type, or a variant of BERT that this file does not implement.
        """
        expected: dict[str, list[Any]] = {
            "model_type": ["bert"],
            "hidden_act": ["gelu", None],
            "position_embedding_type": ["absolute", None],
            "is_decoder": [False, None],
            "tie_word_embeddings": [True, None],
        }
        check_config("BERT", values, expected, _SIZES)
        labels = values.get("id2label") or {}
        return cls(
            **{name: values[name] for name in _SIZES},
            layer_norm_eps=values.get("layer_norm_eps", 1e-12),
            dropout=values.get("hidden_dropout_prob", 0.0),
            labels=tuple(labels[key] for key in sorted(labels, key=int)),
            regression=values.get("problem_type") == "regression",
        )

    def to_hugging_face(self) -> dict[str, Any]:
        """The contents of the `config.json` that `transformers` reads, but for "architectures"."""
        labels = dict(enumerate(self.labels))
        return {
            "model_type": "bert",
            "hidden_act": "gelu",
            **{name: getattr(self, name) for name in _SIZES},
            "layer_norm_eps": self.layer_norm_eps,
            "hidden_dropout_prob": self.dropout,
            "attention_probs_dropout_prob": self.dropout,
            **({"id2label": labels, "label2id": {label: i for i, label in labels.items()}} if labels else {}),
            **({"problem_type": "regression"} if self.regression else {}),
        }


CONFIGS = {
    "tiny": BERTConfig(512, 64, 2, 2, 256, max_position_embeddings=64),
    "small": BERTConfig(6000, 128, 4, 2, 512, max_position_embeddings=64),
    "medium": BERTConfig(8000, 256, 6, 4, 1024, max_position_embeddings=128),
    "bert-base": BERTConfig(),
    "bert-large": BERTConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
}


class Embeddings(nn.Module):
    """Words, positions and segments, added up and normed."""

    def __init__(self, config: BERTConfig, ops: ModuleType) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = Norm(config.hidden_size, config.layer_norm_eps, ops)
        self.drop = Dropout(config.dropout, ops)

    def forward(self, tokens: Tensor, types: Tensor, at: Tensor) -> Tensor:
        """(T) three times -> (T, C)."""
        x = self.word_embeddings(tokens) + self.position_embeddings(at) + self.token_type_embeddings(types)
        return self.drop(self.norm(x)[0])


class Layer(nn.Module):
    """Attention and an MLP; a norm follows each, over its output and its input."""

    def __init__(self, config: BERTConfig, ops: ModuleType) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.head_size, self.dropout, self.gelu = width // config.num_attention_heads, config.dropout, ops.gelu
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm_1 = Norm(width, eps, ops)
        self.up = nn.Linear(width, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, width)
        self.norm_2 = Norm(width, eps, ops)
        self.drop = Dropout(config.dropout, ops)

    def forward(self, x: Tensor, sequences: Packed | Padded) -> Tensor:
        """(..., C) -> (..., C)."""
        q, k, v = split_heads(self.qkv(x), 3, self.head_size).unbind(-3)  # each (..., H, D), a view
        attended = sequences.attend(q, k, v, self.dropout if self.training else 0.0).flatten(-2)
        x, _ = self.norm_1(self.drop(self.proj(attended)), x)
        x, _ = self.norm_2(self.drop(self.down(self.gelu(self.up(x)))), x)
        return x


class BERT(Published):
    """The encoder on the functions of `ops`: `torchweld.ops`, or `torchweld.models.stock` for stock PyTorch.

    As `transformers`' BertModel. Without `pooling` it has no pooler, which heads on tokens do not need.
    """

    title, prefix, ignored = "BERT", "bert.", ("embeddings.position_ids",)

    def __init__(self, config: BERTConfig, ops: ModuleType = torchweld.ops, pooling: bool = True) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.embeddings = Embeddings(config, ops)
        self.layers = nn.ModuleList(Layer(config, ops) for _ in range(config.num_hidden_layers))
        if pooling:
            self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.apply(initialise)

    def forward(self, tokens: Tensor, types: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The last layer's output: (T, C).

        Args:
            tokens, types: (T) of int64; types: the segment, 0 or 1.
            cu_seqlens: (B + 1) of int32, where each sequence starts, and T.
        """
        at = positions(cu_seqlens)
        longest, limit = int(at.max()) + 1, self.config.max_position_embeddings
        if longest > limit:
            raise UserError(f"BERT: expected at most max_position_embeddings = {limit} tokens, but got {longest}")
        sequences = arrange(cu_seqlens, self.ops)
        x = sequences.spread(self.embeddings(tokens, types, at))
        for layer in self.layers:
            x = layer(x, sequences)
        return sequences.gather(x)

    def pooled(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        """What stands for each sequence, made from its first token: (T, C) -> (B, C)."""
        return torch.tanh(self.pooler(hidden[cu_seqlens[:-1].long()]))

    def published_names(self, name: str) -> list[str]:
        """As in `Published`: queries, keys and values apart."""
        return _published_names(name)


# Our names and the published ones; queries, keys and values aside.
_NAMES = [
    ("embeddings.norm.", "embeddings.LayerNorm."),
    ("layers.", "encoder.layer."),
    (".proj.", ".attention.output.dense."),
    (".norm_1.", ".attention.output.LayerNorm."),
    (".up.", ".intermediate.dense."),
    (".down.", ".output.dense."),
    (".norm_2.", ".output.LayerNorm."),
    ("pooler.", "pooler.dense."),
]


def _published_names(name: str) -> list[str]:
    """The published names of what one of our parameters holds."""
    for ours, theirs in _NAMES:
        name = name.replace(ours, theirs)
    kinds = ("query", "key", "value") if ".qkv." in name else ("",)
    return [name.replace(".qkv.", f".attention.self.{kind}.") for kind in kinds]


@torch.no_grad()
def initialise(module: nn.Module) -> None:
    """BERT's: normal with 0.02, biases zero; norms are right as they are."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        module.weight.normal_(std=0.02)
    if isinstance(module, nn.Linear):
        module.bias.zero_()


class Headed(Published):
    """An encoder with a head on it.

    Attributes:
        heads: our names of its parts and the published ones.
        per_token: it has logits of each token, and not of each sequence.
    """

    title = "BERT"
    ignored: ClassVar[tuple[str, ...]] = ("embeddings.position_ids", "cls.predictions.decoder.bias")
    per_token: ClassVar[bool] = False
    heads: tuple[tuple[str, str], ...]
    bert: BERT

    def published(self) -> dict[str, Tensor]:
        """The parameters by their published names."""
        stored = self.bert.to_hugging_face()
        for name, p in self.state_dict().items():
            for ours, theirs in self.heads:
                if name.startswith(ours):
                    stored[theirs + name.removeprefix(ours)] = p.detach()
        return stored

    def load_published(self, stored: Mapping[str, Tensor]) -> None:
        """The inverse of `published`."""
        self.bert.load_hugging_face({name: t for name, t in stored.items() if name.startswith("bert.")})
        own = self.state_dict()
        for ours, theirs in self.heads:
            own |= {ours + n.removeprefix(theirs): t for n, t in stored.items() if n.startswith(theirs)}
        self.load_state_dict(own)


class BERTForPreTraining(Headed):
    """BERT with its two heads: which word was masked, and whether the second segment follows the first."""

    tied: ClassVar = {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"}
    heads = (
        ("transform.", "cls.predictions.transform.dense."),
        ("norm.", "cls.predictions.transform.LayerNorm."),
        ("bias", "cls.predictions.bias"),
        ("follows.", "cls.seq_relationship."),
    )

    def __init__(self, config: BERTConfig, ops: ModuleType = torchweld.ops) -> None:
        super().__init__()
        self.config = config
        self.bert = BERT(config, ops)
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = Norm(config.hidden_size, config.layer_norm_eps, ops)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.follows = nn.Linear(config.hidden_size, 2)
        self.gelu, self.cross_entropy = ops.gelu, ops.cross_entropy
        for module in (self.transform, self.follows):
            initialise(module)

    def words(self, hidden: Tensor) -> Tensor:
        """Logits of the word at each row: (M, C) -> (M, V)."""
        x, _ = self.norm(self.gelu(self.transform(hidden)))
        return F.linear(x, self.bert.embeddings.word_embeddings.weight, self.bias)

    def forward(self, tokens: Tensor, types: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of each token's word, (T, V), and of whether the second segment follows (0) or not (1), (B, 2)."""
        hidden = self.bert(tokens, types, cu_seqlens)
        return self.words(hidden), self.follows(self.bert.pooled(hidden, cu_seqlens))

    def losses(
        self, tokens: Tensor, types: Tensor, cu_seqlens: Tensor, masked: Tensor, words: Tensor, follows: Tensor
    ) -> dict[str, Tensor]:
        """Mean cross-entropies in nats: of `words` (M) at the rows `masked` (M), and of `follows` (B)."""
        hidden = self.bert(tokens, types, cu_seqlens)
        return {
            "mlm": self.cross_entropy(self.words(hidden[masked]), words),
            "nsp": self.cross_entropy(self.follows(self.bert.pooled(hidden, cu_seqlens)), follows),
        }


class BERTForSequenceClassification(Headed):
    """BERT that says of a sequence which of the config's labels it has, or a number."""

    heads = (("classifier.", "classifier."),)

    def __init__(self, config: BERTConfig, ops: ModuleType = torchweld.ops) -> None:
        super().__init__()
        self.config = config
        self.bert = BERT(config, ops)
        self.drop = Dropout(config.dropout, ops)
        self.classifier = nn.Linear(config.hidden_size, max(1, len(config.labels)))
        self.cross_entropy = ops.cross_entropy
        initialise(self.classifier)

    def forward(self, tokens: Tensor, types: Tensor, cu_seqlens: Tensor) -> Tensor:
        """A logit for each label: (T) -> (B, labels)."""
        hidden = self.bert(tokens, types, cu_seqlens)
        return self.classifier(self.drop(self.bert.pooled(hidden, cu_seqlens)))

    def loss(self, tokens: Tensor, types: Tensor, cu_seqlens: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy of the labels' numbers `targets` (B), or the mean squared error of numbers (B)."""
        logits = self(tokens, types, cu_seqlens)
        if self.config.regression:
            return F.mse_loss(logits[:, 0].float(), targets)
        return self.cross_entropy(logits, targets)
