"""ring_attention: every process has a part of the queries, and the keys of all others come by.

At step t process r computes with the keys of process r - t, while those of the next step are on their way. The backward
does the same and sends the gradients of keys and values back to their process, which adds them up in the order of the
steps: the same bits on every run. Liu et al.: Ring Attention, arXiv:2310.01889; the balance is that of Brandon et al.:
Striped Attention, arXiv:2311.09431, with chunks in place of stripes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchweld import backend
from torchweld.distributed.exchange import Message
from torchweld.distributed.parts import Gradients, Results, Softmax, modifiers_of, options_of, sinks_gradient
from torchweld.distributed.schedule import Band, Step, step
from torchweld.distributed.sequence import Spread
from torchweld.ops._attention import Modifiers, Options

_OP = "ring_attention"
Rows = slice


@dataclass(frozen=True)
class Ring:
    """One call: the sequence, chunks of `size` rows, and what the kernels are told."""

    spread: Spread
    size: int
    band: Band
    options: Options
    deterministic: bool

    @property
    def whole(self) -> int:
        """The rows of the whole sequence."""
        return self.size * self.spread.chunks

    def near(self, t: int) -> Step:
        """What this process computes at step t."""
        rank, count = self.spread.rank, self.spread.count
        return step(self.spread, rank, (rank - t) % count, self.size, self.band)

    def far(self, t: int) -> Step:
        """What another process computes at step t with the keys of this one."""
        rank, count = self.spread.rank, self.spread.count
        return step(self.spread, (rank + t) % count, rank, self.size, self.band)

    def rows(self, at: Step) -> Rows:
        """Those of its owner's keys that a step needs; they lie beside each other."""
        return slice(at.chunks[0] * self.size, (at.chunks[-1] + 1) * self.size) if at.chunks else slice(0, 0)

    def fetch(self, t: int, key: Tensor, value: Tensor) -> Message:
        """The keys and values of step t."""
        near, far, rank, count = self.near(t), self.far(t), self.spread.rank, self.spread.count
        needed = self.rows(near)
        return Message(
            _OP, self.spread, key, tag=2 * t,
            to=(rank + t) % count, sent=[x[:, :, self.rows(far)] for x in (key, value)] if far.chunks else [],
            source=near.owner, shapes=[_shape(x, needed) for x in (key, value)] if near.chunks else [],
        )  # fmt: skip

    def give_back(self, t: int, dkey: Tensor, dvalue: Tensor, key: Tensor, value: Tensor) -> Message:
        """The gradients of the keys of step t, to their owner; those of this process's own come from another."""
        near, far, rank, count = self.near(t), self.far(t), self.spread.rank, self.spread.count
        needed = self.rows(far)
        return Message(
            _OP, self.spread, dkey, tag=2 * t + 1,
            to=near.owner, sent=[dkey, dvalue] if near.chunks else [],
            source=(rank + t) % count, shapes=[_shape(x, needed) for x in (key, value)] if far.chunks else [],
        )  # fmt: skip


def _shape(t: Tensor, rows: Rows) -> list[int]:
    return [t.shape[0], t.shape[1], rows.stop - rows.start, t.shape[3]]


class RingAttention(torch.autograd.Function):
    """(output, lse) of this process's queries (B, H, n, D), over the keys (B, Hkv, n, D) of all."""

    @staticmethod
    def forward(
        ctx: Any, ring: Ring, query: Tensor, key: Tensor, value: Tensor, *modifiers: Any
    ) -> tuple[Tensor, Tensor]:
        given, count = Modifiers(*modifiers), ring.spread.count
        softmax = Softmax(query, value, given, ring.options)
        coming = ring.fetch(1, key, value) if count > 1 else None
        for t in range(count):
            at = ring.near(t)
            k, v = (x[:, :, ring.rows(at)] for x in (key, value))
            if t > 0:
                assert coming is not None
                arrived = coming.wait()
                k, v = arrived if arrived else (k, v)
                coming = ring.fetch(t + 1, key, value) if t + 1 < count else None
            for block in at.blocks:
                options = options_of(block, ring.options, ring.whole)
                softmax.add(block, query, k, v, modifiers_of(block, given), options)
        if given.sinks is not None:
            softmax.add_sinks(given.sinks)
        wide, statistics, lse = softmax.finish()
        output = wide.to(query.dtype)
        kept = wide if backend.module(query.device).leaves_wide_output else output
        ctx.save_for_backward(query, key, value, kept, statistics, lse, *modifiers)
        ctx.ring = ring
        ctx.set_materialize_grads(False)
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, doutput: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, output, statistics, lse, *modifiers = ctx.saved_tensors
        ring, given = ctx.ring, Modifiers(*modifiers)
        names = ("query", "key", "value", *Modifiers._fields)
        wanted = {n for n, needed in zip(names, ctx.needs_input_grad[1:], strict=True) if needed}
        if doutput is None:
            doutput = torch.zeros_like(query[..., :1]).expand(*query.shape[:3], value.shape[3])
        results = Results(query, output, statistics, doutput, dlse)
        grads = Gradients(results, given, wanted, ring.deterministic)
        dkey, dvalue = (torch.zeros_like(t, dtype=torch.float32) for t in (key, value))
        count = ring.spread.count
        coming = ring.fetch(1, key, value) if count > 1 else None
        going: tuple[int, Message] | None = None
        for t in range(count):
            at = ring.near(t)
            rows = ring.rows(at)
            k, v, dk, dv = (x[:, :, rows] for x in (key, value, dkey, dvalue))
            if t > 0:
                assert coming is not None
                arrived = coming.wait()
                k, v = arrived if arrived else (k, v)
                dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
                coming = ring.fetch(t + 1, key, value) if t + 1 < count else None
            for block in at.blocks:
                options = options_of(block, ring.options, ring.whole)
                for total, part in zip(
                    (dk, dv), grads.add(block, k, v, modifiers_of(block, given), options), strict=True
                ):
                    total[:, :, block.k_begin : block.k_end] += part
            if t > 0:
                _take(ring, going, dkey, dvalue)
                going = t, ring.give_back(t, dk, dv, key, value)
        _take(ring, going, dkey, dvalue)
        found = {
            "query": grads.query.to(query.dtype),
            "key": dkey.to(key.dtype),
            "value": dvalue.to(value.dtype),
            "bias": None if given.bias is None or grads.bias is None else grads.bias.to(given.bias.dtype),
            "alibi_slopes": None if grads.slopes is None else grads.slopes.to(given.alibi_slopes.dtype),  # type: ignore[union-attr]
            "sinks": sinks_gradient(results, given.sinks, lse)
            if "sinks" in wanted and given.sinks is not None
            else None,
        }
        return None, *(found.get(name) if name in wanted else None for name in names)


def _take(ring: Ring, going: tuple[int, Message] | None, dkey: Tensor, dvalue: Tensor) -> None:
    """Adds the gradients that came back from a step to those of this process's keys."""
    if going is None:
        return
    t, message = going
    rows = ring.rows(ring.far(t))
    for total, part in zip((dkey, dvalue), message.wait(), strict=False):
        total[:, :, rows] += part
