"""The optimizers on DTensors, in two processes over gloo: FSDP2, and meshes with copies, beside one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gloo_processes import WORLD, in_two_processes, needs_gloo
from torchweld import optim

pytestmark = [needs_gloo, pytest.mark.slow]
LIMIT = 0.5


def model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    # 7 rows over two processes: shards of different sizes; a bias of one element: an empty shard.
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1))


def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer, rank: int, world: int, clip: bool) -> list[Tensor]:
    """Each process works on its share of the batch; the norms before clipping."""
    generator = torch.Generator().manual_seed(1)
    norms: list[Any] = []
    for _ in range(4):
        x = torch.randn(8, 5, generator=generator)
        optimizer.zero_grad()
        net(x[rank::world]).square().mean().mul(5).backward()
        if clip:
            norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), LIMIT))
        optimizer.step()
        if not clip:
            assert isinstance(optimizer, optim.AdamW)
            norms.append(optimizer.grad_norm)
    return norms


def fsdp(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415
    from torch.distributed.tensor import DTensor  # noqa: PLC0415

    alone, sharded = model(), model()
    expected = train(alone, torch.optim.AdamW(alone.parameters(), lr=0.1), 0, 1, clip=True)
    for layer in sharded:
        fully_shard(layer)
    fully_shard(sharded)
    optimizer = optim.AdamW(sharded.parameters(), lr=0.1, max_grad_norm=LIMIT)
    versions = [p._version for p in sharded.parameters()]
    norms = train(sharded, optimizer, rank, WORLD, clip=False)
    torch.testing.assert_close(norms, expected)
    for p, q, version in zip(sharded.parameters(), alone.parameters(), versions, strict=True):
        assert isinstance(p.data, DTensor)
        torch.testing.assert_close(p.data.full_tensor(), q)
        assert p._version > version
        assert type(optimizer.state[p]["exp_avg"]) is type(p)


def copies(rank: int, folder: str) -> None:
    """Copies on two processes count once in the norm; a gradient that is still to be summed is summed first."""
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard  # noqa: PLC0415

    mesh = init_device_mesh("cpu", (WORLD,))
    torch.manual_seed(0)
    whole = [torch.randn(6, 4), torch.randn(5), torch.randn(3)]
    grads = [torch.randn_like(t) for t in whole]
    plain = [torch.nn.Parameter(t.clone()) for t in whole]
    spread = [
        torch.nn.Parameter(torch.distributed.tensor.distribute_tensor(t.clone(), mesh, [placement]))
        for t, placement in zip(whole[:2], (Shard(1), Replicate()), strict=True)
    ] + [torch.nn.Parameter(whole[2].clone())]
    for p, g in zip(plain, grads, strict=True):
        p.grad = g.clone()
    spread[0].grad = torch.distributed.tensor.distribute_tensor(grads[0], mesh, [Shard(1)])
    spread[1].grad = DTensor.from_local(grads[1] / WORLD, mesh, [Partial()])
    spread[2].grad = grads[2].clone()
    a, b = optim.AdamW(spread, max_grad_norm=LIMIT), torch.optim.AdamW(plain)
    a.step()
    torch.testing.assert_close(a.grad_norm, torch.nn.utils.clip_grad_norm_(plain, LIMIT))
    b.step()
    for p, q in zip(spread, plain, strict=True):
        torch.testing.assert_close(p.full_tensor() if isinstance(p, DTensor) else p, q)


@pytest.mark.parametrize("check", [fsdp, copies])
def test_sharded_parameters(check: Callable[[int, str], None]) -> None:
    in_two_processes(check)
