"""BERT with a head on each token: where an answer begins and ends, and which tag a word has.

Devlin et al., arXiv:1810.04805, sections 4.2 and 5.3. These heads need no pooler. T tokens of B sequences
are packed, as in `bert`.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn

import torchweld.ops
from torchweld.models.bert import BERT, BERTConfig, Headed, initialise
from torchweld.models.layers import Dropout
from torchweld.models.sequences import Padded


class _PerToken(Headed):
    """An old checkpoint may have a pooler all the same."""

    per_token = True
    ignored = (*Headed.ignored, "pooler.dense.weight", "pooler.dense.bias")


class BERTForQuestionAnswering(_PerToken):
    """BERT that says of each token how likely an answer begins and ends with it."""

    heads = (("spans.", "qa_outputs."),)

    def __init__(self, config: BERTConfig, ops: ModuleType = torchweld.ops) -> None:
        super().__init__()
        self.config = config
        self.bert = BERT(config, ops, pooling=False)
        self.spans = nn.Linear(config.hidden_size, 2)
        self.cross_entropy = ops.cross_entropy
        initialise(self.spans)

    def forward(self, tokens: Tensor, types: Tensor, cu_seqlens: Tensor) -> Tensor:
        """A logit for the beginning and one for the end: (T) -> (T, 2)."""
        return self.spans(self.bert(tokens, types, cu_seqlens))

    def loss(self, tokens: Tensor, types: Tensor, cu_seqlens: Tensor, ends: Tensor) -> Tensor:
        """The mean cross-entropy of both ends, each among the tokens of its sequence.

        Args:
            ends: (B, 2), the numbers of the first and of the last token within the sequence.
        """
        rows = Padded(cu_seqlens, torch)
        logits = rows.spread(self(tokens, types, cu_seqlens).float()).transpose(1, 2)  # (B, 2, longest)
        logits = logits.masked_fill(~rows.mask[:, 0], -torch.inf)
        return self.cross_entropy(logits.flatten(0, 1), ends.flatten())


class BERTForTokenClassification(_PerToken):
    """BERT that says of each token which of the config's labels it has."""

    heads = (("classifier.", "classifier."),)

    def __init__(self, config: BERTConfig, ops: ModuleType = torchweld.ops) -> None:
        super().__init__()
        self.config = config
        self.bert = BERT(config, ops, pooling=False)
        self.drop = Dropout(config.dropout, ops)
        self.classifier = nn.Linear(config.hidden_size, max(1, len(config.labels)))
        self.cross_entropy = ops.cross_entropy
        initialise(self.classifier)

    def forward(self, tokens: Tensor, types: Tensor, cu_seqlens: Tensor) -> Tensor:
        """A logit for each label: (T) -> (T, labels)."""
        return self.classifier(self.drop(self.bert(tokens, types, cu_seqlens)))

    def loss(self, tokens: Tensor, types: Tensor, cu_seqlens: Tensor, places: Tensor, tags: Tensor) -> Tensor:
        """The mean cross-entropy of the labels' numbers `tags` (M) at the rows `places` (M)."""
        hidden = self.bert(tokens, types, cu_seqlens)
        return self.cross_entropy(self.classifier(self.drop(hidden[places])), tags)
