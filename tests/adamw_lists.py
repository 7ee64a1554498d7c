"""Lists of tensors for the tests of adamw_: what is fed in, and how results are compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchweld import ops, reference

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# Empty, one, inside a vector, a vector and its tail, the chunk of the concatenation and its neighbours, many chunks.
SHAPES = [(0,), (1,), (3,), (17,), (63,), (8, 8), (65,), (127,), (5, 26), (3, 4001)]
DTYPES = [(F32, F32, F32)] + [(p, g, s) for p in (BF16, F16) for g in (p, F32) for s in (p, F32)]
HYPER: dict[str, Any] = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.1}
VARIANTS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adam": {"decoupled": False, "maximize": True},
    "amsgrad": {"amsgrad": True, "weight_decay": 0.0},
    "clip": {"max_grad_norm": 1.0},
}
PARAM, GRAD, MEAN, SQUARE, LARGEST, STEP = range(6)
Lists = list[list[Tensor]]


def make(
    shapes: Sequence[Sequence[int]],
    param: torch.dtype = F32,
    grad: torch.dtype = F32,
    state: torch.dtype = F32,
    *,
    seed: int = 0,
    offset: int = 0,
    device: str = "cpu",
) -> Lists:
    """params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps; `offset` elements into their memory."""
    gen = torch.Generator().manual_seed(seed)

    def one(shape: Sequence[int], dtype: torch.dtype, positive: bool) -> Tensor:
        n = math.prod(shape)
        x = torch.randn(n, generator=gen)
        memory = torch.zeros(offset + n, dtype=dtype)
        memory[offset:] = x.abs() if positive else x
        return memory.to(device)[offset:].view(shape)

    kinds = ((param, False), (grad, False), (state, False), (state, True), (state, True))
    lists = [[one(s, dtype, positive) for s in shapes] for dtype, positive in kinds]
    return [*lists, [torch.tensor(float(3 * (i % 2)), device=device) for i in range(len(shapes))]]


def clone(lists: Lists, dtype: torch.dtype | None = None) -> Lists:
    return [[t.to(dtype if i < STEP else None, copy=True) for t in each] for i, each in enumerate(lists)]


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().view(-1).view(torch.uint8)


def same_bits(a: Lists, b: Lists) -> bool:
    pairs = [(x, y) for xs, ys in zip(a, b, strict=True) for x, y in zip(xs, ys, strict=True)]
    return all(torch.equal(_bits(x), _bits(y)) for x, y in pairs)


def worst(ours: list[Tensor], exact: list[Tensor]) -> float:
    return max((a.double() - b).abs().max().item() for a, b in zip(ours, exact, strict=True) if a.numel())


def hold_to_float64(shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype], variant: str, device: str) -> None:
    """Three steps, each with other gradients, are at most twice as far from float64 as those of the definition."""
    options = {**HYPER, **VARIANTS[variant]}
    ours = make(shapes, *dtypes, device=device)
    exact, narrow = clone(ours, F64), clone(ours)
    for seed in range(3):
        fresh = make(shapes, *dtypes, seed=seed, device=device)[GRAD]
        for each in (ours, exact, narrow):
            each[GRAD] = [g.to(e.dtype, copy=True) for g, e in zip(fresh, each[GRAD], strict=True)]
        norm = ops.adamw_(*ours, **options)
        exact_norm = reference.adamw_(*exact, **options)
        reference.adamw_(*narrow, **options)
        assert (norm is None) == (exact_norm is None)
        if norm is not None and exact_norm is not None:
            assert abs(norm.item() - exact_norm.item()) <= 1e-6 * exact_norm.item()
    assert torch.equal(torch.stack(ours[STEP]).double(), torch.stack(exact[STEP]).double())
    for i in (PARAM, MEAN, SQUARE, LARGEST):
        scale = max(t.abs().max().item() for t in exact[i] if t.numel())
        tiny = torch.finfo(ours[i][0].dtype).eps * scale
        assert worst(ours[i], exact[i]) <= 2 * worst(narrow[i], exact[i]) + tiny
