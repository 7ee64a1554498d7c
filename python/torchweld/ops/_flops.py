"""FLOP formulas of the ops for `torch.utils.flop_counter`: products count as in torch's own ops; all else counts 0.

torch.utils.flop_counter imports Triton where it is installed, so this module does not import it. A counter that is
active when an op is called gets the formulas at that call.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchweld import _torch


def _scores(query: Tensor, key: Tensor, starts_q: Tensor | None, starts_k: Tensor | None) -> int:
    """The number of scores. Scores that causal and window hide count too, as in torch."""
    if starts_q is None or starts_k is None:
        return math.prod(query.shape[:-1]) * key.shape[-2]
    lengths = [starts.diff().long() for starts in (starts_q, starts_k)]  # packed: (total, H, D)
    return query.shape[1] * int((lengths[0] * lengths[1]).sum())


Formula = Callable[[dict[str, Any]], int]  # of the arguments of an op, by name


def _attention(by_key: int, by_value: int) -> Formula:
    """Of an op that makes `by_key` products of key's head size and `by_value` of value's for each score."""

    def flops(a: dict[str, Any]) -> int:
        scores = _scores(a["query"], a["key"], a.get("cu_seqlens_q"), a.get("cu_seqlens_k"))
        return 2 * scores * (by_key * a["key"].shape[-1] + by_value * a["value"].shape[-1])

    return flops


def _paged(a: dict[str, Any]) -> int:
    scores = a["query"].shape[1] * a["query"].shape[2] * int(a["cache_seqlens"].sum())
    return 2 * scores * (a["key_cache"].shape[-1] + a["value_cache"].shape[-1])


def _head(a: dict[str, Any]) -> int:
    """The logits; the gradients of input and weight, where they are asked for."""
    products = 1 + (a["dinput"] + a["dweight"] if a.get("dloss") is not None else 0)
    return 2 * math.prod(a["input"].shape) * a["weight"].shape[0] * products


_FORMULAS = {
    "attention": _attention(1, 1),
    "attention_forward": _attention(1, 1),
    "attention_backward": _attention(3, 2),  # the scores once more, dquery, dkey; dscores, dvalue
    "paged_attention": _paged,
    "linear_cross_entropy": _head,
}


def _registered(op: str, formula: Formula) -> Callable[..., int]:
    """The formula as a FLOP counter calls it: with the arguments of the op as they were given."""

    def flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        names = [a.name for a in _torch.arguments_of(getattr(torch.ops.torchweld, op).default)]
        return formula(dict(zip(names, args, strict=False)) | kwargs)

    return flops


def inform_counters() -> None:
    """Gives the formulas to the FLOP counters that are active."""
    if "torch.utils.flop_counter" not in sys.modules:
        return
    for mode in _torch.dispatch_mode_stack():
        registry = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if registry is not None and torch.ops.torchweld.attention not in registry:
            registry.update({getattr(torch.ops.torchweld, op): _registered(op, f) for op, f in _FORMULAS.items()})
