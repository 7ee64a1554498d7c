"""torchweld as a kernel of Hugging Face's `kernels`: functions, and layers for `kernelize`."""

from torchweld.ops import (
    add_layer_norm,
    add_rms_norm,
    attention,
    cross_entropy,
    geglu,
    gelu,
    layer_norm,
    linear_cross_entropy,
    rms_norm,
    rotary_embedding,
    scaled_dot_product_attention,
    swiglu,
)

from . import layers

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "cross_entropy",
    "geglu",
    "gelu",
    "layer_norm",
    "layers",
    "linear_cross_entropy",
    "rms_norm",
    "rotary_embedding",
    "scaled_dot_product_attention",
    "swiglu",
]
