"""DTensors (FSDP2, tensor parallelism): each process steps its own shards; the norm is that of the whole."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from torchweld import ops

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))

Sharding = tuple[Any, tuple[Any, ...]]  # device mesh, placements


def is_dtensor(t: Tensor) -> bool:
    """Whether t is spread over processes. Loads nothing: without torch.distributed.tensor there are none."""
    if type(t) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def unserved(params: list[Tensor]) -> str | None:
    """What no kernel can take; None if there is no such parameter."""
    if _PLAIN.issuperset(map(type, params)):
        return None
    odd = (type(p).__name__ for p in params if type(p) not in _PLAIN and not is_dtensor(p))
    return next((f"parameters of type {name}" for name in odd), None)


def localise(lists: dict[str, list[Tensor]]) -> list[Sharding | None]:
    """Puts the local shards in the DTensors' places; how each parameter was sharded."""
    params = lists["param"]
    if _PLAIN.issuperset(map(type, params)):
        return [None] * len(params)
    shardings: list[Sharding | None] = []
    for i, p in enumerate(params):
        if type(p) in _PLAIN:
            shardings.append(None)
            continue
        mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
        shardings.append((mesh, placements))
        for each in lists.values():
            each[i] = _local(each[i], placements)
    return shardings


def _local(t: Any, placements: tuple[Any, ...]) -> Tensor:
    if not is_dtensor(t):
        return t  # a step is on every process alike
    if t.placements != placements:
        t = t.redistribute(placements=placements)
    local = t.to_local()
    return local.wait() if hasattr(local, "wait") else local  # of a collective that may still be under way


def global_norm(grads: list[tuple[Tensor, Sharding | None]], grad_scale: Tensor | None) -> Tensor:
    """The norm of all gradients together, over all devices and processes; the same on every process."""
    parts: dict[tuple[torch.device, Sharding | None], list[Tensor]] = {}
    for grad, sharding in grads:
        parts.setdefault((grad.device, sharding), []).append(grad)
    norms = []
    for (_, sharding), each in parts.items():
        norm = ops.grad_norm(each, grad_scale=grad_scale)
        norms.append(norm if sharding is None else _over_processes(norm, *sharding))
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))


def _over_processes(norm: Tensor, mesh: Any, placements: tuple[Any, ...]) -> Tensor:
    """From the norm of the local shards to that of the whole tensors; copies on several processes count once."""
    squared = norm.double().square()
    for dim, placement in enumerate(placements):
        if not placement.is_replicate():
            torch.distributed.all_reduce(squared, group=mesh.get_group(dim))
    return squared.sqrt().float()
