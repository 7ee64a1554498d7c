"""Transformer models on `torchweld.ops`: one file and one dataclass config each."""

from torchweld.models import stock
from torchweld.models.gpt2 import CONFIGS, GPT2, GPT2Config

__all__ = ["CONFIGS", "GPT2", "GPT2Config", "stock"]
