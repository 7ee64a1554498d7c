"""cross_entropy of logits whose classes are spread over processes.

Each process makes the row statistics of its classes by the kernel of cross_entropy. Their merge, and the logit of the
target, which one process has, are all that travels: three numbers for each row. With the merged statistics the kernel
of the backward makes the probabilities of the whole softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchweld.distributed.layouts import Layout, parts_of
from torchweld.ops._arguments import KERNEL_DTYPES
from torchweld.ops.cross_entropy import row_gradients, row_losses


@dataclass(frozen=True)
class Vocabulary:
    """The classes [begin, end) of this process, and the processes that have all."""

    begin: int
    end: int
    classes: int
    group: Any

    @classmethod
    def of(cls, layout: Layout, label: str, classes: int) -> Vocabulary:
        at = layout.cuts.index(label)
        begin, end = parts_of(layout.mesh.size(at), classes, layout.mesh.get_local_rank(at))
        return cls(begin, end, classes, layout.mesh.get_group(at))


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, ignore_index: int, own: Vocabulary) -> tuple[Tensor, Tensor]:
        counted = target != ignore_index
        here = counted & (target >= own.begin) & (target < own.end)
        # A class of this process for every row: a row whose target is elsewhere needs its statistics too.
        place = (target - own.begin).clamp(0, max(own.end - own.begin - 1, 0)).masked_fill(~counted, 0)
        if logits.shape[1]:
            _, (largest, total) = row_losses(logits, place)
            reached = logits.gather(1, place.unsqueeze(1)).squeeze(1).float()
        else:  # fewer classes than processes
            largest = logits.new_full((logits.shape[0],), -torch.inf, dtype=torch.float32)
            total, reached = torch.zeros_like(largest), torch.zeros_like(largest)
        top = largest.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, group=own.group)
        both = torch.stack((total * torch.exp(largest - top), torch.where(here, reached - top, 0.0)))
        dist.all_reduce(both, group=own.group)
        whole, below = both  # the difference comes first: it is exact, however large the logits are
        logarithm = torch.log(whole)
        ctx.save_for_backward(logits, place, counted, here, torch.stack((top, whole)))
        ctx.set_materialize_grads(False)
        return torch.where(counted, logarithm - below, 0.0), top + logarithm

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        logits, place, counted, here, stats = ctx.saved_tensors
        if logits.shape[1] == 0 or (dloss is None and dlse is None):
            return torch.zeros_like(logits), None, None, None
        own = torch.zeros_like(stats[0]) if dloss is None else dloss.float().masked_fill(~counted, 0.0)
        factor = own if dlse is None else own + dlse.float()
        dlogits = row_gradients(factor, logits, place, stats)
        # The kernel took every row's target for one of this process. At these classes the gradient is made here.
        at = place.unsqueeze(1)
        p = torch.exp(logits.gather(1, at).squeeze(1).float() - stats[0]) / stats[1]
        dlogits.scatter_(1, at, (p * factor - own * here).to(dlogits.dtype).unsqueeze(1))
        return dlogits, None, None, None


def losses_of(logits: Tensor, target: Tensor, ignore_index: int, own: Vocabulary) -> tuple[Tensor, Tensor]:
    """The loss and the lse of each row, float32, from this process's logits (N, V of it); differentiable.

    Rows whose target is `ignore_index` have loss 0. A target that is no class raises IndexError on the CPU, unless
    compiled.
    """
    if logits.dtype not in KERNEL_DTYPES:
        raise TypeError(
            f"[cross_entropy] input: expected float32, bfloat16 or float16 where its classes are sharded, but got "
            f"{logits.dtype}; redistribute the classes with Replicate()"
        )
    strange = (target != ignore_index) & ((target < 0) | (target >= own.classes))
    if not (target.is_cuda or torch.compiler.is_compiling()) and bool(strange.any()):
        raise IndexError(
            f"[cross_entropy] target: expected classes from 0 to {own.classes - 1} or {ignore_index}, but got others"
        )
    found: tuple[Tensor, Tensor] = _Losses.apply(logits, target, ignore_index, own)
    return found
