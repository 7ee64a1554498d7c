"""Output and gradients at sizes that nobody chose: hypothesis draws the cases, by the rule that all are held to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchweld.testing import Case, Oracle
from torchweld.testing.attention import AttentionCase
from torchweld.testing.cross_entropy import CrossEntropyCase
from torchweld.testing.gated import GatedCase
from torchweld.testing.gelu import GeluCase
from torchweld.testing.inputs import LAYOUTS
from torchweld.testing.layer_norm import LayerNormCase
from torchweld.testing.linear_cross_entropy import LinearCrossEntropyCase
from torchweld.testing.rotary_embedding import RotaryCase

DRAWN = {"name": "drawn", "regime": "drawn by hypothesis"}


@st.composite
def matrices(draw: st.DrawFn) -> tuple[int, int]:
    """Rows and columns of 2^10 to 2^18 elements in all, rarely powers of two."""
    columns = draw(st.integers(1, 20_000))
    return draw(st.integers(1 + 2**10 // columns, 1 + 2**18 // columns)), columns


def layer_norm_case(size: tuple[int, int], layout: str, flags: list[bool]) -> LayerNormCase:
    options = dict(zip(("weight", "bias", "add"), flags, strict=True))
    return LayerNormCase(**DRAWN, rows=(size[0],), shape=(size[1],), layout=layout, **options)


def cross_entropy_case(size: tuple[int, int], layout: str, flags: list[bool]) -> CrossEntropyCase:
    options = {"reduction": "none" if flags[0] else "mean", "smoothing": 0.1 * flags[1], "ignored": 0.1 * flags[2]}
    return CrossEntropyCase(**DRAWN, rows=size[0], classes=size[1], layout=layout, **options)


def gelu_case(size: tuple[int, int], layout: str) -> GeluCase:
    return GeluCase(**DRAWN, shape=size, layout=layout)


def linear_cross_entropy_case(
    size: tuple[int, int], features: int, layout: str, flags: list[bool]
) -> LinearCrossEntropyCase:
    options: dict[str, Any] = {
        "bias": flags[0],
        "reduction": "none" if flags[1] else "mean",
        "smoothing": 0.1 * flags[2],
    }
    rows, features = (size[0],), min(features, 1 + 2**18 // size[1])
    return LinearCrossEntropyCase(**DRAWN, rows=rows, features=features, classes=size[1], layout=layout, **options)


def gated_case(size: tuple[int, int], layout: str, activation: str, packed: bool) -> GatedCase:
    return GatedCase(**DRAWN, shape=size, layout=layout, activation=activation, packed=packed)


LAYOUT, FLAGS = st.sampled_from(LAYOUTS), st.lists(st.booleans(), min_size=3, max_size=3)
LARGE = {
    "layer_norm": st.builds(layer_norm_case, matrices(), LAYOUT, FLAGS),
    "cross_entropy": st.builds(cross_entropy_case, matrices(), LAYOUT, FLAGS),
    "linear_cross_entropy": st.builds(linear_cross_entropy_case, matrices(), st.integers(1, 300), LAYOUT, FLAGS),
    "gelu": st.builds(gelu_case, matrices(), LAYOUT),
    "gated": st.builds(gated_case, matrices(), LAYOUT, st.sampled_from(["silu", "none", "tanh"]), packed=st.booleans()),
    "rotary_embedding": st.builds(
        RotaryCase,
        **{key: st.just(word) for key, word in DRAWN.items()},
        batch=st.integers(1, 3),
        heads=st.integers(1, 12),
        kv_heads=st.integers(0, 4),
        tokens=st.integers(1, 400),
        dim=st.integers(1, 130).map(lambda n: 2 * n),
        interleaved=st.booleans(),
        seq_dim=st.sampled_from([-2, -3]),
        layout=LAYOUT,
        columns=st.sampled_from(["pair", "element", "independent"]),
    ),
    "scaled_dot_product_attention": st.builds(
        AttentionCase,
        **{key: st.just(word) for key, word in DRAWN.items()},
        batch=st.integers(1, 2),
        heads=st.just(4),
        kv_heads=st.sampled_from([1, 2, 4]),
        queries=st.integers(1, 400),
        keys=st.integers(1, 400),
        dim=st.integers(1, 260),
        causal=st.booleans(),
        merged=st.booleans(),
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_and_odd(name: str) -> None:
    @settings(max_examples=15, derandomize=True, database=None, deadline=None)
    @given(case=LARGE[name], dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    def holds(case: Case, dtype: torch.dtype) -> None:
        Oracle(case, dtype).check()

    holds()
