"""The definition of every op in plain PyTorch: differentiable, on any device, in any dtype."""

from torchweld.reference.adamw import adamw_
from torchweld.reference.attention import attention, scaled_dot_product_attention
from torchweld.reference.cross_entropy import cross_entropy
from torchweld.reference.dropout import dropout
from torchweld.reference.geglu import geglu
from torchweld.reference.gelu import gelu
from torchweld.reference.layer_norm import add_layer_norm, layer_norm
from torchweld.reference.linear_cross_entropy import linear_cross_entropy
from torchweld.reference.optimizer import grad_norm
from torchweld.reference.paged_attention import paged_attention
from torchweld.reference.rms_norm import add_rms_norm, rms_norm
from torchweld.reference.rotary_embedding import rotary_embedding
from torchweld.reference.sgd import sgd_
from torchweld.reference.swiglu import swiglu

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
