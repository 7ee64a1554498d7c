"""The fused functions. Names and argument order are those of `torch.nn.functional` where a twin exists there."""

from torchweld.ops._optimizer import grad_norm
from torchweld.ops.adamw import adamw_
from torchweld.ops.attention import attention
from torchweld.ops.cross_entropy import cross_entropy
from torchweld.ops.dropout import dropout
from torchweld.ops.geglu import geglu
from torchweld.ops.gelu import gelu
from torchweld.ops.layer_norm import add_layer_norm, layer_norm
from torchweld.ops.linear_cross_entropy import linear_cross_entropy
from torchweld.ops.paged_attention import paged_attention
from torchweld.ops.rms_norm import add_rms_norm, rms_norm
from torchweld.ops.rotary_embedding import rotary_embedding
from torchweld.ops.scaled_dot_product_attention import scaled_dot_product_attention
from torchweld.ops.sgd import sgd_
from torchweld.ops.swiglu import swiglu

__all__ = [
    "adamw_",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "cross_entropy",
    "dropout",
    "geglu",
    "gelu",
    "grad_norm",
    "layer_norm",
    "linear_cross_entropy",
    "paged_attention",
    "rms_norm",
    "rotary_embedding",
    "scaled_dot_product_attention",
    "sgd_",
    "swiglu",
]


def __dir__() -> list[str]:
    return __all__
