"""The families of trials, by name. Each makes a trial of a draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torchweld.testing.fuzz import activations, attention, losses, norms, optimizers
from torchweld.testing.fuzz.draw import Draw
from torchweld.testing.fuzz.edges import SIDES
from torchweld.testing.fuzz.hostile import hostile
from torchweld.testing.fuzz.trial import Judged, Trial

_JUDGED: dict[str, Callable[[Draw], Judged]] = {
    "attention": attention.dense,
    "decoding": attention.decoding,
    "packed_attention": attention.packed,
    "paged_attention": attention.paged,
    "scaled_dot_product_attention": attention.sdpa,
    "norms": norms.norms,
    "dropout": activations.dropout,
    "gelu": activations.gelu,
    "gated": activations.gated,
    "rotary_embedding": activations.rotary_embedding,
    "cross_entropy": losses.cross_entropy,
    "linear_cross_entropy": losses.linear_cross_entropy,
    "adamw": optimizers.adamw,
    "sgd": optimizers.sgd,
}


def edges(draw: Draw) -> Judged:
    """A case of any op at the edges of memory."""
    return replace(_JUDGED[draw.one(*_JUDGED)](draw), edge=draw.one(*SIDES))


FAMILIES: dict[str, Callable[[Draw], Trial]] = {
    **_JUDGED,
    "optimizers": optimizers.lockstep,
    "edges": edges,
    "hostile": hostile,
}
