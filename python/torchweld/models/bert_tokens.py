"""BERT with a head on each token: where the answer to a question begins and ends (arXiv:1810.04805, section 4.2).

The head needs no pooler. T tokens of B sequences are packed, as in `bert`.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn

import torchweld.ops
from torchweld.models.bert import BERT, BERTConfig, Headed, initialise
from torchweld.models.sequences import Padded


class BERTForQuestionAnswering(Headed):
    """BERT that says of each token how likely an answer begins and ends with it."""

    per_token = True
    heads = (("spans.", "qa_outputs."),)
    ignored = (*Headed.ignored, "pooler.dense.weight", "pooler.dense.bias")

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
