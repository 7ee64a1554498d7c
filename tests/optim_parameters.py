"""Parameters for the tests of the optimizers, their gradients, and steps with them."""

from __future__ import annotations

import torch
from torch import Tensor

from torchweld import optim

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
PAIRS = {name: (getattr(optim, name), getattr(torch.optim, name)) for name in ("Adam", "AdamW", "SGD")}


def parameters(dtype: torch.dtype = F32, seed: int = 0) -> list[torch.nn.Parameter]:
    gen = torch.Generator().manual_seed(seed)
    shapes = ((5, 7), (7,), (), (2, 3, 4, 5), (0, 3), (1031,))
    made = [torch.nn.Parameter(torch.randn(s, generator=gen).to(dtype)) for s in shapes]
    made[3].data = made[3].data.to(memory_format=torch.channels_last)
    return [*made, torch.nn.Parameter(torch.zeros(3, dtype=dtype))]  # the last never gets a gradient


def set_grads(params: list[torch.nn.Parameter], seed: int, scale: float = 1.0) -> None:
    gen = torch.Generator().manual_seed(100 + seed)
    for p in params[:-1]:
        grad = scale * torch.randn(p.shape, generator=gen)
        p.grad = torch.empty_like(p, memory_format=torch.preserve_format).copy_(grad)


def states(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter]) -> list[dict[str, Tensor]]:
    return [optimizer.state[p] for p in params if p in optimizer.state]


def run(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], seeds: range = range(3)) -> list[Tensor]:
    for seed in seeds:
        set_grads(params, seed)
        optimizer.step()
    return [p.detach() for p in params]
