"""Transformer models on `torchweld.ops`: one file and one dataclass config each."""

from torchweld.models import bert, gpt2, gpt3, seq2seq, stock
from torchweld.models.bert import BERT, BERTConfig, BERTForPreTraining, BERTForSequenceClassification
from torchweld.models.gpt2 import CONFIGS, GPT2, GPT2Config
from torchweld.models.gpt3 import GPT3, GPT3Config
from torchweld.models.seq2seq import Seq2Seq, Seq2SeqConfig

__all__ = [
    "BERT",
    "CONFIGS",
    "GPT2",
    "GPT3",
    "BERTConfig",
    "BERTForPreTraining",
    "BERTForSequenceClassification",
    "GPT2Config",
    "GPT3Config",
    "Seq2Seq",
    "Seq2SeqConfig",
    "bert",
    "gpt2",
    "gpt3",
    "seq2seq",
    "stock",
]
