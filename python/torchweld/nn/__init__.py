"""Drop-ins that subclass torch.nn: same constructor and state_dict, another `forward`. And modules that torch lacks."""

from torchweld.nn.attention import MultiheadAttention
from torchweld.nn.dropout import Dropout
from torchweld.nn.gated import GEGLU, SwiGLU
from torchweld.nn.layer_norm import LayerNorm
from torchweld.nn.linear_cross_entropy import LinearCrossEntropy
from torchweld.nn.rms_norm import RMSNorm
from torchweld.nn.rotary_embedding import RotaryEmbedding
from torchweld.nn.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "GEGLU",
    "Dropout",
    "LayerNorm",
    "LinearCrossEntropy",
    "MultiheadAttention",
    "RMSNorm",
    "RotaryEmbedding",
    "SwiGLU",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]


def __dir__() -> list[str]:
    return __all__
