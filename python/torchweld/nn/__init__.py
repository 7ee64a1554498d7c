"""Drop-ins that subclass torch.nn: same constructor and state_dict, another `forward`. And a loss that torch lacks."""

from torchweld.nn.attention import MultiheadAttention
from torchweld.nn.layer_norm import LayerNorm
from torchweld.nn.linear_cross_entropy import LinearCrossEntropy
from torchweld.nn.rms_norm import RMSNorm
from torchweld.nn.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "LayerNorm",
    "LinearCrossEntropy",
    "MultiheadAttention",
    "RMSNorm",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]


def __dir__() -> list[str]:
    return __all__
