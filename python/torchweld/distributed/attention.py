"""Attention over a sequence that is spread over processes: the public functions and their checks."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from torchweld import backend
from torchweld.distributed.exchange import agree
from torchweld.distributed.heads import attend_by_heads, key_copies
from torchweld.distributed.ring import Ring, RingAttention
from torchweld.distributed.schedule import Band
from torchweld.distributed.sequence import Spread
from torchweld.ops._arguments import check_dense, flag, number
from torchweld.ops._attention import Modifiers, Options, refusal
from torchweld.ops._attention_checks import (
    check_band,
    check_bias,
    check_by_head,
    check_common,
    check_dropout,
    check_heads,
    check_sequences,
    check_softcap,
    fail,
)
from torchweld.reference.philox import draw_seed

RING, ALL_TO_ALL = "ring_attention", "all_to_all_attention"
_MASK_COLUMNS = 64  # where a part of a dropout mask may begin


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mesh: DeviceMesh | Any = None,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = 0.0,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    deterministic: bool = True,
    return_lse: bool = False,
    order: str = "zigzag",
) -> Tensor | tuple[Tensor, Tensor]:
    """`torchweld.ops.attention` of a sequence over itself, of which each process has a part.

    Every process computes the output of its own queries, while the keys and values of the others come by. Parts are
    merged by their row statistics in float32: the result is that of one process but for rounding, has the same bits on
    every run, and drops the same weights for the same seed. Only keys that a query sees travel: under a causal mask
    three quarters of them, under a window those of the neighbours.

    Args:
        query, key, value: this process's part, as `shard_sequence` makes it: (B, H, n, D), or packed (n, H, D); of the
            same shape in all processes. float32, bfloat16 or float16.
        mesh: of one dimension, or a process group; None: all processes.
        causal, window, softcap, alibi_slopes, sinks, dropout_p, scale, deterministic, return_lse: as in `attention`.
        bias: broadcasts to (B, H, n, N): this process's rows, and the keys of the whole sequence in their order. Not
            beside cu_seqlens.
        seed: the same in all processes; None: drawn by the first.
        cu_seqlens: int32, where the packed sequences start in the whole, and its length; the same in all processes.
            Not beside dropout.
        order: that of `shard_sequence`.

    Returns:
        This process's part of the output, and with `return_lse` of lse. The gradients of alibi_slopes and sinks are
        those of this process's queries: the sum over the processes is the gradient.

    Raises:
        RuntimeError: what a process has does not fit, in itself or the others'; or a process is gone.
        TypeError, ValueError: as in `attention`.
    """
    call = _Call(RING, query, key, value, mesh, order)
    modifiers = call.checked(Modifiers(bias, alibi_slopes, sinks, seed, cu_seqlens, cu_seqlens), dropout_p)
    options = call.options(causal=causal, window=window, softcap=softcap, dropout_p=dropout_p, scale=scale)
    if modifiers.seed is not None:
        if cu_seqlens is not None:
            fail(RING, "dropout_p", "0 beside cu_seqlens", dropout_p, "use all_to_all_attention")
        if call.size % _MASK_COLUMNS:
            expected = f"chunks of a multiple of {_MASK_COLUMNS} rows beside dropout_p"
            fail(RING, "query", expected, f"{call.size}", "pad the sequence, or use all_to_all_attention")
    placed = options.dropout_p > 0 or bias is not None or alibi_slopes is not None
    starts = None if cu_seqlens is None else tuple(cu_seqlens.tolist())
    band = Band(options.left, options.right, placed, starts)
    ring = Ring(call.spread, call.size, band, options, flag(RING, "deterministic", deterministic))
    return call.result(RingAttention.apply(ring, *call.tensors, *modifiers), return_lse)


def all_to_all_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mesh: DeviceMesh | Any = None,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    deterministic: bool = True,
    return_lse: bool = False,
    order: str = "zigzag",
) -> Tensor | tuple[Tensor, Tensor]:
    """As `ring_attention`, but the processes trade rows for heads: each attends to whole sequences, of its heads.

    Query's heads must be a multiple of the processes, and key's too, or the processes a multiple of them. A process has
    the whole sequence of its heads in memory, as much as it has of the part of all heads. There is no bias.
    """
    call = _Call(ALL_TO_ALL, query, key, value, mesh, order)
    modifiers = call.checked(Modifiers(None, alibi_slopes, sinks, seed, cu_seqlens, cu_seqlens), dropout_p)
    options = call.options(causal=causal, window=window, softcap=softcap, dropout_p=dropout_p, scale=scale)
    heads, kv_heads = (t.shape[1] for t in call.tensors[:2])
    if key_copies(heads, kv_heads, call.spread.count) == 0:
        expected = f"heads that {call.spread.count} processes can share"
        fail(ALL_TO_ALL, "query, key", expected, f"{heads} and {kv_heads}", "use ring_attention")
    deterministic = flag(ALL_TO_ALL, "deterministic", deterministic)
    return call.result(attend_by_heads(call.spread, *call.tensors, modifiers, options, deterministic), return_lse)


class _Call:
    """The arguments that both functions have, checked; packed sequences as (1, H, n, D)."""

    def __init__(self, op: str, query: Tensor, key: Tensor, value: Tensor, mesh: Any, order: str) -> None:
        check_dense(op, query=query, key=key, value=value)
        check_common(op, query, key, value)
        self.op, self.spread, self.packed = op, Spread.over(op, mesh, order), query.dim() == 3
        for name, t in (("query", query), ("key", key), ("value", value)):
            if t.dim() not in (3, 4) or t.dim() != query.dim():
                fail(op, name, "[batch, heads, rows, head size], or packed [rows, heads, head size]", list(t.shape))
        tensors = (query, key, value)
        q, k, v = (t.transpose(0, 1).unsqueeze(0) if self.packed else t for t in tensors)
        self.tensors = (q, k, v)
        check_heads(op, *self.tensors)
        rows = self.tensors[0].shape[2]
        if self.tensors[1].shape[2] != rows:
            fail(op, "key", f"query's {rows} rows: a sequence attends to itself", self.tensors[1].shape[2])
        if reason := refusal(self.tensors[0], self.tensors[2]):
            fail(op, "query", "what the kernels take", reason, "use torchweld.ops.attention on the whole sequence")
        if query.device.type not in backend.kernels:
            fail(op, "query", f"a device with kernels, {' or '.join(backend.kernels)}", query.device)
        self.size = self.spread.chunk_of(op, rows)
        self.whole = rows * self.spread.count

    def checked(self, given: Modifiers, dropout_p: float) -> Modifiers:
        """The modifiers of the whole sequence, with a seed that all processes share where there is a dropout."""
        op, query = self.op, self.tensors[0]
        bias, alibi_slopes, cu_seqlens, seed = given.bias, given.alibi_slopes, given.cu_seqlens_q, given.seed
        batch = query.shape[0]
        if (cu_seqlens is not None) != self.packed:
            got = "a tensor" if cu_seqlens is not None else "None"
            fail(op, "cu_seqlens", "a tensor beside packed sequences, and None beside others", got)
        if cu_seqlens is not None:
            batch = check_sequences(op, query, cu_seqlens, cu_seqlens)
            starts = cu_seqlens.tolist()
            if starts[0] != 0 or starts[-1] != self.whole or sorted(starts) != starts:
                fail(op, "cu_seqlens", f"numbers that rise from 0 to the whole length {self.whole}", starts)
            if bias is not None:
                fail(op, "bias", "None beside cu_seqlens", "a tensor")
        if bias is not None:
            check_bias(op, "bias", bias, query, (*query.shape[:3], self.whole))
        check_by_head(op, query, batch, alibi_slopes, given.sinks)
        if self.packed and alibi_slopes is not None and alibi_slopes.dim() == 2:
            fail(op, "alibi_slopes", "shape [heads] beside cu_seqlens", list(alibi_slopes.shape))
        if check_dropout(op, dropout_p) == 0:
            seed = None
        elif seed is None:
            seed = draw_seed(query.device)
            dist.broadcast(seed, self.spread.global_rank(0), group=self.spread.group)
        elif seed.dtype is not torch.int64 or seed.numel() != 1:
            fail(op, "seed", "int64 of one element", f"{seed.dtype} of shape {list(seed.shape)}")
        return given._replace(seed=seed)

    def options(
        self,
        *,
        causal: bool,
        window: tuple[int | None, int | None] | None,
        softcap: float | None,
        dropout_p: float,
        scale: float | None,
    ) -> Options:
        op, query = self.op, self.tensors[0]
        left, right = check_band(op, flag(op, "causal", causal), window)
        scale = None if scale is None else number(op, "scale", scale, "a number or None")
        options = Options(
            scale=1.0 / math.sqrt(max(query.shape[-1], 1)) if scale is None else scale,
            softcap=check_softcap(op, softcap),
            left=left,
            right=right,
            dropout_p=check_dropout(op, dropout_p),
        )
        shapes = [list(t.shape) for t in self.tensors]
        if not query.is_cuda:  # there the answer would have to be waited for
            agree(
                op,
                self.spread,
                query.device,
                shapes=shapes,
                dtype=query.dtype,
                options=options,
                order=self.spread.order,
            )
        return options

    def result(self, found: tuple[Tensor, Tensor], return_lse: Any) -> Tensor | tuple[Tensor, Tensor]:
        output, lse = found
        if self.packed:
            output, lse = output[0].transpose(0, 1), lse[0]
        return (output, lse) if flag(self.op, "return_lse", return_lse) else output
