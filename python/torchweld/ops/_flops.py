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


def _formula(op: str, by_key: int, by_value: int) -> Callable[..., int]:
    """The formula of an op that makes `by_key` products of key's head size and `by_value` of value's for each score."""

    def flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        names = [a.name for a in _torch.arguments_of(getattr(torch.ops.torchweld, op).default)]
        a = dict(zip(names, args, strict=False)) | kwargs
        scores = _scores(a["query"], a["key"], a.get("cu_seqlens_q"), a.get("cu_seqlens_k"))
        return 2 * scores * (by_key * a["key"].shape[-1] + by_value * a["value"].shape[-1])

    return flops


def _paged(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    *_: Any,
    **__: Any,
) -> int:
    scores = query.shape[1] * query.shape[2] * int(cache_seqlens.sum())
    return 2 * scores * (key_cache.shape[-1] + value_cache.shape[-1])


def _head(
    input: Tensor, weight: Tensor, bias: Any, target: Any, *rest: Any, dloss: Any = None, wanted: Any = (), **_: Any
) -> int:
    """The logits; the gradients of input and weight, where they are asked for."""
    if len(rest) > 4:
        dloss, wanted = rest[4:6]
    products = 1 + (sum(wanted[:2]) if dloss is not None else 0)
    return 2 * math.prod(input.shape) * weight.shape[0] * products


_FORMULAS = {
    "attention": _formula("attention", 1, 1),
    "attention_forward": _formula("attention_forward", 1, 1),
    "attention_backward": _formula("attention_backward", 3, 2),  # the scores once more, dquery, dkey; dscores, dvalue
    "paged_attention": _paged,
    "linear_cross_entropy": _head,
}


def inform_counters() -> None:
    """Gives the formulas to the FLOP counters that are active."""
    if "torch.utils.flop_counter" not in sys.modules:
        return
    for mode in _torch.dispatch_mode_stack():
        registry = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if registry is not None and torch.ops.torchweld.attention not in registry:
            registry.update({getattr(torch.ops.torchweld, op): formula for op, formula in _FORMULAS.items()})
