"""Models on `torchweld.ops`: one file and one dataclass config each."""

from torchweld.models import ast, bert, gpt2, gpt3, seq2seq, stock, vae, vit
from torchweld.models.ast import AST, ASTConfig
from torchweld.models.bert import BERT, BERTConfig, BERTForPreTraining, BERTForSequenceClassification
from torchweld.models.bert_tokens import BERTForQuestionAnswering, BERTForTokenClassification
from torchweld.models.gpt2 import CONFIGS, GPT2, GPT2Config
from torchweld.models.gpt3 import GPT3, GPT3Config
from torchweld.models.seq2seq import Seq2Seq, Seq2SeqConfig
from torchweld.models.vae import VAE, VAEConfig
from torchweld.models.vit import ViT, ViTConfig

__all__ = [
    "AST",
    "BERT",
    "CONFIGS",
    "GPT2",
    "GPT3",
    "VAE",
    "ASTConfig",
    "BERTConfig",
    "BERTForPreTraining",
    "BERTForQuestionAnswering",
    "BERTForSequenceClassification",
    "BERTForTokenClassification",
    "GPT2Config",
    "GPT3Config",
    "Seq2Seq",
    "Seq2SeqConfig",
    "VAEConfig",
    "ViT",
    "ViTConfig",
    "ast",
    "bert",
    "gpt2",
    "gpt3",
    "seq2seq",
    "stock",
    "vae",
    "vit",
]
