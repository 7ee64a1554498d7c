"""Transformer models on `torchweld.ops`: one file and one dataclass config each."""

from torchweld.models import gpt2, gpt3, stock
from torchweld.models.gpt2 import CONFIGS, GPT2, GPT2Config
from torchweld.models.gpt3 import GPT3, GPT3Config

__all__ = ["CONFIGS", "GPT2", "GPT3", "GPT2Config", "GPT3Config", "gpt2", "gpt3", "stock"]
