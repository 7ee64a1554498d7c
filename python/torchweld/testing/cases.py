"""The lists of cases, by op."""

from __future__ import annotations

from torchweld.testing.adamw import ADAMW
from torchweld.testing.attention import ATTENTION
from torchweld.testing.case import Case
from torchweld.testing.cross_entropy import CROSS_ENTROPY
from torchweld.testing.dropout import DROPOUT
from torchweld.testing.gated import GEGLU, SWIGLU
from torchweld.testing.gelu import GELU
from torchweld.testing.layer_norm import ADD_LAYER_NORM, ADD_RMS_NORM, LAYER_NORM, RMS_NORM
from torchweld.testing.linear_cross_entropy import LINEAR_CROSS_ENTROPY
from torchweld.testing.paged_attention import PAGED_ATTENTION
from torchweld.testing.rotary_embedding import ROTARY_EMBEDDING
from torchweld.testing.sgd import SGD


def ops() -> dict[str, tuple[Case, ...]]:
    """All ops with kernels, with their cases."""
    return {
        "attention": ATTENTION,
        "paged_attention": PAGED_ATTENTION,
        "layer_norm": LAYER_NORM,
        "add_layer_norm": ADD_LAYER_NORM,
        "rms_norm": RMS_NORM,
        "add_rms_norm": ADD_RMS_NORM,
        "dropout": DROPOUT,
        "gelu": GELU,
        "swiglu": SWIGLU,
        "geglu": GEGLU,
        "rotary_embedding": ROTARY_EMBEDDING,
        "cross_entropy": CROSS_ENTROPY,
        "linear_cross_entropy": LINEAR_CROSS_ENTROPY,
        "adamw": ADAMW,
        "sgd": SGD,
    }


def cases(op: str) -> tuple[Case, ...]:
    """The cases of one op; the first is small and ordinary."""
    return ops()[op]
