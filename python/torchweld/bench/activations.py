"""gelu, dropout, the gated units and rotary_embedding."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from torchweld.bench.functional import works
from torchweld.bench.harness import Settings, Work
from torchweld.testing import Case
from torchweld.testing.case import Tensors
from torchweld.testing.dropout import DropoutCase
from torchweld.testing.gated import GatedCase
from torchweld.testing.gelu import GeluCase
from torchweld.testing.rotary_embedding import RotaryCase

_ROWS, _COLUMNS = 2048, 8192  # a block of tokens, and the width of an MLP
_DROPOUT = 0.1
_TOKENS, _HEADS, _KV_HEADS, _DIM = 2048, 32, 8, 128


def activations(op: str, settings: Settings) -> Iterator[Work]:
    """Both forms of GELU; dropout; SiLU's and GELU's gated unit; rotary embeddings of grouped queries."""
    timed = _drop if op == "dropout" else None
    for dtype in settings.dtypes:
        for case in _cases(op)[: 1 if settings.quick else None]:
            yield from works(case, {"name": case.name}, dtype, settings, _cost(case, dtype), timed)


def _drop(x: Tensors) -> Tensors:
    return {"output": torch.nn.functional.dropout(x["x"], _DROPOUT)}


def _cases(op: str) -> list[Case]:
    shape, name = (_ROWS, _COLUMNS), f"{_ROWS} x {_COLUMNS}"
    if op == "gelu":
        return [
            GeluCase(name=f"{name} {word}", regime="bench", shape=shape, approximate=form)
            for form, word in (("none", "exact"), ("tanh", "tanh"))
        ]
    if op == "dropout":
        return [DropoutCase(name=f"{name}, {_DROPOUT}", regime="bench", shape=shape, p=_DROPOUT)]
    if op == "rotary_embedding":
        rotary = RotaryCase(
            name=f"{_TOKENS} x {_HEADS} on {_KV_HEADS} x {_DIM}",
            regime="bench",
            batch=1,
            heads=_HEADS,
            kv_heads=_KV_HEADS,
            tokens=_TOKENS,
            dim=_DIM,
            seq_dim=-3,
        )
        return [rotary]
    forms = ("silu",) if op == "swiglu" else ("none", "tanh")
    return [
        GatedCase(name=name if form != "tanh" else f"{name} tanh", regime="bench", shape=shape, activation=form)
        for form in forms
    ]


def _cost(case: Case, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    # Bytes. gelu: reads x, writes y; reads dy and x, writes dx. A gated unit: reads gate and up, writes y; reads dy,
    # gate and up, writes both gradients. Dropout: reads x, writes y, either way; so do query and key of rotary.
    size = float(_ROWS * _COLUMNS * dtype.itemsize)
    forward, backward = {"gelu": (2, 3), "swiglu": (3, 5), "geglu": (3, 5)}.get(case.op, (2, 2))
    if case.op == "rotary_embedding":
        size = float(_TOKENS * (_HEADS + _KV_HEADS) * _DIM * dtype.itemsize)
    return {"forward": {"bytes": forward * size}, "backward": {"bytes": backward * size}}
