"""Attention of queries over keys that come in parts: each part by the kernels, merged by row statistics in float32."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from torchweld.distributed.schedule import Block
from torchweld.ops._attention import DIFFERENTIABLE, Modifiers, Options, backward_op, forward_op, score_unit


def options_of(block: Block, options: Options, whole: int) -> Options:
    """Of a block of an attention over `whole` queries."""
    return options._replace(
        left=block.left,
        right=block.right,
        part=True,
        offset=block.offset,
        mask_first=block.mask_first,
        mask_queries=whole,
        mask_column=block.mask_column,
    )


def modifiers_of(block: Block, modifiers: Modifiers) -> Modifiers:
    """Of a block. A bias has this process's rows, and the columns of the whole sequence. Sinks come at the end."""
    bias = modifiers.bias
    if bias is not None:
        bias = _columns(_rows(bias, block), block)
    starts = None
    if block.starts:
        assert modifiers.cu_seqlens_q is not None
        starts = torch.tensor(block.starts, dtype=torch.int32, device=modifiers.cu_seqlens_q.device)
    return Modifiers(bias, modifiers.alibi_slopes, None, modifiers.seed, starts, starts)


def _rows(bias: Tensor, block: Block) -> Tensor:
    whole = bias.dim() > 1 and bias.shape[-2] > 1
    return bias[..., block.q_begin : block.q_end, :] if whole else bias


def _columns(bias: Tensor, block: Block) -> Tensor:
    return bias[..., block.key : block.key + block.keys] if bias.dim() > 0 and bias.shape[-1] > 1 else bias


def _call(t: Tensor, block: Block) -> Tensor:
    """(1, H, n, D) as the ops take it: packed sequences are (total, H, D)."""
    return t[0].transpose(0, 1) if block.starts else t


def _back(t: Tensor, block: Block) -> Tensor:
    return t.transpose(0, 1).unsqueeze(0) if block.starts else t


class Softmax:
    """The output of queries (B, H, n, Dv) and their row statistics, as parts of the keys come in.

    output / total is the output. total is the sum of exp(score - largest), in the kernels' unit of scores.
    """

    def __init__(self, query: Tensor, value: Tensor, modifiers: Modifiers, options: Options) -> None:
        shape = query.shape[:3]
        self.unit = score_unit(query, modifiers, options)
        self.output = query.new_zeros((*shape, value.shape[-1]), dtype=torch.float32)
        self.largest = query.new_full(shape, -torch.inf, dtype=torch.float32)
        self.total = query.new_zeros(shape, dtype=torch.float32)

    def add(
        self, block: Block, query: Tensor, key: Tensor, value: Tensor, modifiers: Modifiers, options: Options
    ) -> None:
        """A block; key and value are the rows that the block numbers."""
        q = query[:, :, block.q_begin : block.q_end]
        k, v = (t[:, :, block.k_begin : block.k_end] for t in (key, value))
        output, wide, statistics = forward_op(*(_call(t, block) for t in (q, k, v)), modifiers, options, 2)
        part = _back(output if wide is None or wide.dim() == 1 else wide, block)
        largest, inverse = statistics.unsqueeze(1) if block.starts else statistics
        rows = slice(block.q_begin, block.q_end)
        own, scale = self._merge(rows, largest, torch.where(inverse > 0, 1 / inverse, 0.0))
        self.output[:, :, rows].mul_(own.unsqueeze(-1)).addcmul_(part, scale.unsqueeze(-1))

    def _merge(self, rows: slice, largest: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """Adds a sum to those of `rows`; returns the factors of what is there, and of the normalised new output."""
        before = self.largest[:, :, rows]
        both = torch.maximum(before, largest)
        finite = both.masked_fill(both.isneginf(), 0.0)
        own = torch.exp((before - finite) * self.unit)
        scale = total * torch.exp((largest - finite) * self.unit)
        self.largest[:, :, rows] = both
        self.total[:, :, rows] = self.total[:, :, rows] * own + scale
        return own, scale

    def add_sinks(self, sinks: Tensor) -> None:
        """One more score of each row, which has no value."""
        score = sinks.float().view(-1, 1).expand_as(self.largest) / self.unit
        own, _ = self._merge(slice(None), score, torch.where(score.isneginf(), 0.0, 1.0))
        self.output.mul_(own.unsqueeze(-1))

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Output in float32, statistics (2, B, H, n) for `backward`, and lse."""
        inverse = torch.where(self.total > 0, 1 / self.total, 0.0)
        output = self.output.mul_(inverse.unsqueeze(-1))
        lse = torch.where(self.total > 0, self.largest * self.unit + torch.log(self.total), -torch.inf)
        return output, torch.stack((self.largest, inverse)), lse


@dataclass(frozen=True)
class Results:
    """What the backward needs of this process's queries: all that it has beside the keys that come in."""

    query: Tensor
    output: Tensor  # float32 where the kernels take it so
    statistics: Tensor
    doutput: Tensor
    dlse: Tensor | None


def accumulated(total: Tensor | None, like: Tensor, begin: int, end: int, part: Tensor) -> Tensor:
    """`total`, float32 and of the shape of `like`, with `part` added to its rows. None: zeros, which need no memory."""
    if total is None:
        if end - begin == like.shape[2]:
            return part.float()
        total = torch.zeros_like(like, dtype=torch.float32)
    total[:, :, begin:end] += part
    return total


class Gradients:
    """The gradients of the queries of this process and of what modifies their scores, as blocks come in; float32."""

    def __init__(self, results: Results, modifiers: Modifiers, wanted: Collection[str], deterministic: bool) -> None:
        def empty(name: str, t: Tensor | None) -> Tensor | None:
            return None if t is None or name not in wanted else torch.zeros_like(t, dtype=torch.float32)

        self.results, self.deterministic = results, deterministic
        self.query: Tensor | None = None
        self.bias, self.slopes = empty("bias", modifiers.bias), empty("alibi_slopes", modifiers.alibi_slopes)
        self.mask = [True, True, True, self.bias is not None, self.slopes is not None, False]
        assert len(self.mask) == len(DIFFERENTIABLE)

    def add(
        self, block: Block, key: Tensor, value: Tensor, modifiers: Modifiers, options: Options
    ) -> tuple[Tensor, Tensor]:
        """A block; key and value are the rows that the block numbers. The gradients of the block's own of them."""
        rows, columns = slice(block.q_begin, block.q_end), slice(block.k_begin, block.k_end)
        r = self.results
        q, out, dout = (_call(t[:, :, rows], block) for t in (r.query, r.output, r.doutput))
        k, v = (_call(t[:, :, columns], block) for t in (key, value))
        statistics, dlse = r.statistics[..., rows].contiguous(), None if r.dlse is None else r.dlse[..., rows]
        if block.starts:
            statistics, dlse = statistics[:, 0], None if dlse is None else dlse[0]
        dq, dk, dv, dbias, dslopes, _ = backward_op(
            dout, dlse, out, statistics, q, k, v, modifiers, options, self.mask, self.deterministic
        )
        self.query = accumulated(self.query, r.query, block.q_begin, block.q_end, _back(dq, block))
        if self.bias is not None:
            _columns(_rows(self.bias, block), block).add_(dbias)
        if self.slopes is not None:
            self.slopes += dslopes
        return _back(dk, block), _back(dv, block)


def sinks_gradient(results: Results, sinks: Tensor, lse: Tensor) -> Tensor:
    """A sink has a part of the probability, and no value."""
    probability = torch.exp(sinks.float().view(-1, 1) - lse).masked_fill(sinks.isneginf().view(-1, 1), 0.0)
    delta = (results.doutput.float() * results.output.float()).sum(-1)
    by_row = probability * ((0.0 if results.dlse is None else results.dlse) - delta)
    return by_row.sum((0, 2)).to(sinks.dtype)
