"""ring_attention: every process has a part of the queries, and the keys of all others come by.

At step t process r computes with the keys of process r - t, while those of the next step are on their way. The backward
does the same and sends the gradients of keys and values back to their process, which adds them up in the order of the
steps: the same bits on every run. Liu et al.: Ring Attention, arXiv:2310.01889; the balance is that of Brandon et al.:
Striped Attention, arXiv:2311.09431, with chunks in place of stripes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchweld import backend
from torchweld.distributed.exchange import Message
from torchweld.distributed.parts import (
    Gradients,
    Results,
    Softmax,
    accumulated,
    modifiers_of,
    options_of,
    sinks_gradient,
)
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
            _OP, self.spread, key, tag=4 * t,
            to=(rank + t) % count, sent=[x[:, :, self.rows(far)] for x in (key, value)] if far.chunks else [],
            source=near.owner, shapes=[_shape(x, needed) for x in (key, value)] if near.chunks else [],
        )  # fmt: skip

    def steps(self, key: Tensor, value: Tensor) -> Iterator[tuple[int, Step, Tensor, Tensor]]:
        """The steps, each with its keys and values. Those of the next step are on their way while it computes."""
        coming: Message | None = None
        for t in range(self.spread.count):
            at = self.near(t)
            held = [x[:, :, self.rows(at)] for x in (key, value)]
            if coming is not None:
                held = coming.wait() or held
            coming = self.fetch(t + 1, key, value) if t + 1 < self.spread.count else None
            yield t, at, held.pop(0), held.pop(0)  # here nothing keeps them in memory

    def give_back(self, t: int, grads: Sequence[Tensor], likes: tuple[Tensor, Tensor]) -> Message:
        """The gradients of the keys of step t, to their owner; those of this process's own come from another."""
        near, far, rank, count = self.near(t), self.far(t), self.spread.rank, self.spread.count
        needed = self.rows(far)
        return Message(
            _OP, self.spread, likes[0].new_empty(0, dtype=torch.float32), tag=4 * t + 2, to=near.owner, sent=grads,
            source=(rank + t) % count, shapes=[_shape(x, needed) for x in likes] if far.chunks else [],
        )  # fmt: skip


def _shape(t: Tensor, rows: Rows) -> list[int]:
    return [t.shape[0], t.shape[1], rows.stop - rows.start, t.shape[3]]


class RingAttention(torch.autograd.Function):
    """(output, lse) of this process's queries (B, H, n, D), over the keys (B, Hkv, n, D) of all."""

    @staticmethod
    def forward(
        ctx: Any, ring: Ring, query: Tensor, key: Tensor, value: Tensor, *modifiers: Any
    ) -> tuple[Tensor, Tensor]:
        given = Modifiers(*modifiers)
        softmax = Softmax(query, value, given, ring.options)
        for _, at, k, v in ring.steps(key, value):
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
        own: list[Tensor | None] = [None, None]  # the gradients of this process's keys and values
        going: tuple[int, Message] | None = None
        for t, at, k, v in ring.steps(key, value):
            totals: list[Tensor | None] = [None, None]
            for block in at.blocks:
                parts = grads.add(block, k, v, modifiers_of(block, given), options_of(block, ring.options, ring.whole))
                for i, (like, part) in enumerate(zip((k, v), parts, strict=True)):
                    totals[i] = accumulated(totals[i], like, block.k_begin, block.k_end, part)
                del parts, part
            del k, v
            if t == 0:
                _add(own, ring.rows(at), totals, (key, value))
            else:
                _take(ring, going, own, (key, value))
                going = t, ring.give_back(t, [x for x in totals if x is not None], (key, value))
        _take(ring, going, own, (key, value))
        dquery, dkey, dvalue = (
            torch.zeros_like(like) if x is None else x.to(like.dtype)
            for x, like in ((grads.query, query), (own[0], key), (own[1], value))
        )
        found = {
            "query": dquery,
            "key": dkey,
            "value": dvalue,
            "bias": None if given.bias is None or grads.bias is None else grads.bias.to(given.bias.dtype),
            "alibi_slopes": None if grads.slopes is None else grads.slopes.to(given.alibi_slopes.dtype),  # type: ignore[union-attr]
            "sinks": sinks_gradient(results, given.sinks, lse)
            if "sinks" in wanted and given.sinks is not None
            else None,
        }
        return None, *(found.get(name) if name in wanted else None for name in names)


def _add(own: list[Tensor | None], rows: Rows, totals: Sequence[Tensor | None], likes: tuple[Tensor, Tensor]) -> None:
    """Adds gradients of rows of this process's keys and values."""
    for i, (total, like) in enumerate(zip(totals, likes, strict=False)):
        if total is not None:
            own[i] = accumulated(own[i], like, rows.start, rows.stop, total)


def _take(
    ring: Ring, going: tuple[int, Message] | None, own: list[Tensor | None], likes: tuple[Tensor, Tensor]
) -> None:
    """Adds the gradients that came back from a step."""
    if going is not None:
        t, message = going
        _add(own, ring.rows(ring.far(t)), message.wait(), likes)
