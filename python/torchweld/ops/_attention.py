"""The registered ops behind `torchweld.ops.attention`: implementation, fake, and what the kernels do not take.

With cu_seqlens, (B, H, N, D) is (total, H, D) and (B, H, Nq) is (H, total_q): packed sequences.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchweld import backend
from torchweld.ops._arguments import KERNEL_DTYPES
from torchweld.ops._register import register, settle

ALIGNMENTS = ("top_left", "bottom_right")


class Modifiers(NamedTuple):
    """The tensors that modify the scores or the softmax, the dropout's seed, and where packed sequences start."""

    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    seed: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None


class Options(NamedTuple):
    """The numbers. -1 means: no bound of the band, an unknown length.

    The last six place a call that is a part of a longer attention in the whole. `part`: the backward gets the output
    and the statistics of rows that see other keys too. `offset` is added to the shift of
    query i against the keys. `mask_*` say which part of the dropout mask [B, heads, queries] x keys this is: the row of
    query 0 of head 0, the sizes of the whole (0: those of the call), and the column of key 0, a multiple of 64.
    """

    scale: float
    softcap: float = 0.0
    left: int = -1
    right: int = -1
    bottom_right: bool = False
    dropout_p: float = 0.0
    max_seqlen_q: int = -1
    max_seqlen_k: int = -1
    part: bool = False
    offset: int = 0
    mask_first: int = 0
    mask_heads: int = 0
    mask_queries: int = 0
    mask_column: int = 0


PLAIN = Modifiers()
DIFFERENTIABLE = ("query", "key", "value", "bias", "alibi_slopes", "sinks")  # in the order of the op's `mask`


# ---- Implementation. The kernels read any strides but the last; they fill what is allocated here.


def operand(t: Tensor, name: str) -> Tensor:
    return t if t.stride(-1) == 1 and not t.is_neg() else settle(t, f"[attention] {name}")


def heads_like(query: Tensor, size: int) -> Tensor:
    """An empty (B, H, N, size), in memory (B, N, H, size) if query is so: merging the heads then costs no copy."""
    if query.dim() == 3:
        return query.new_empty((*query.shape[:2], size))
    batch, heads, rows, dim = query.shape
    if size == dim and type(batch) is int and type(rows) is int and query.is_contiguous():
        return torch.empty_like(query)  # the same, sooner
    of_head, of_row = query.stride()[1:3]
    if type(of_head) is int and type(of_row) is int:
        merged = of_head < of_row
    else:  # in a graph, whose number of rows may not be known
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # noqa: PLC0415  (slow to import)

        merged = statically_known_true(of_head < of_row)
    head, row = (size, heads * size) if merged else (rows * size, size)
    return torch.empty_strided(
        (batch, heads, rows, size), (heads * rows * size, head, row, 1), dtype=query.dtype, device=query.device
    )


def row_statistics(query: Tensor, rows: int) -> Tensor:
    """float32 (rows, B, H, Nq), packed (rows, H, total_q).

    1 row: lse. 2 rows: max and 1 / sum, of which the backward makes P; lse is too coarse. 3 rows: these, then lse.
    """
    shape = query.shape[:3] if query.dim() == 4 else query.shape[1::-1]
    return query.new_empty((rows, *shape), dtype=torch.float32)


def score_unit(query: Tensor, modifiers: Modifiers, options: Options) -> float:
    """A score is this times what row statistics count in: score_unit (csrc/cpu), score_scale_of (csrc/cuda)."""
    plain = 1e-30 < options.scale < 1e30 and options.softcap == 0 and modifiers.bias is modifiers.alibi_slopes is None
    return options.scale if plain and not (query.is_cuda and options.dropout_p > 0) else 1.0


def wide_output(output: Tensor) -> Tensor | None:
    """An empty float32 tensor for the output before its rounding to 16 bits. None: no kernel fills it.

    The backward reads it in place of the output. The rounding of the output would make delta wrong by more than the
    gradients of the scores, where one key has nearly all the weight or values are far from zero.
    """
    kernels = backend.kernels.get(output.device.type)
    if output.element_size() > 2 or kernels is None or not kernels.leaves_wide_output:
        return None
    return torch.empty_like(output, dtype=torch.float32)


def _outputs(
    query: Tensor, key: Tensor, value: Tensor, modifiers: Modifiers, options: Options, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The results of the training forward, not filled: output, wide output (or an empty tensor) and row statistics."""
    output = heads_like(query, value.shape[-1])
    wide = wide_output(output) if rows > 1 else None  # 1 row: no backward follows
    return output, query.new_empty(0) if wide is None else wide, row_statistics(query, rows)


def _prepared(query: Tensor, key: Tensor, modifiers: Modifiers) -> Modifiers:
    """The modifiers in the shapes of the kernels: bias (B, H, Nq, Nk), slopes float32 (B, H), sinks float32 (H).

    Broadcast dimensions get stride 0. Nothing is copied for them.
    """
    bias, alibi_slopes, sinks, seed = modifiers.bias, modifiers.alibi_slopes, modifiers.sinks, modifiers.seed
    lens_q, lens_k = modifiers.cu_seqlens_q, modifiers.cu_seqlens_k
    heads = query.shape[1]
    if bias is not None:
        bias = (
            bias if bias.dim() > 0 and bias.stride(-1) <= 1 and not bias.is_neg() else settle(bias, "[attention] bias")
        )
        bias = bias.expand(query.shape[0], heads, query.shape[2], key.shape[2])
    if alibi_slopes is not None:
        batch = query.shape[0] if lens_q is None else lens_q.numel() - 1
        alibi_slopes = settle(alibi_slopes, "[attention] alibi_slopes", torch.float32).expand(batch, heads)
    if sinks is not None:
        sinks = settle(sinks, "[attention] sinks", torch.float32)
    if lens_q is not None and lens_k is not None:
        lens_q, lens_k = settle(lens_q, "[attention] cu_seqlens_q"), settle(lens_k, "[attention] cu_seqlens_k")
    if seed is not None:
        seed = settle(seed, "[attention] seed")
    return Modifiers(
        bias=bias, alibi_slopes=alibi_slopes, sinks=sinks, seed=seed, cu_seqlens_q=lens_q, cu_seqlens_k=lens_k
    )


def run_forward(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, wide: Tensor | None, statistics: Tensor | None,
    modifiers: Modifiers, options: Options,
) -> Tensor:  # fmt: skip
    """Fills `output`, `wide` (see `wide_output`) and `statistics`; returns `output`."""
    q, k, v = operand(query, "query"), operand(key, "key"), operand(value, "value")
    if modifiers != PLAIN:  # compares None by identity, which is cheap
        modifiers = _prepared(q, k, modifiers)
    backend.kernels[q.device.type].attention_forward(
        query=q, key=k, value=v, modifiers=modifiers, options=options,
        output=output, wide_output=wide, statistics=statistics,
    )  # fmt: skip
    return output


def _inference(query: Tensor, key: Tensor, value: Tensor, modifiers: Modifiers, options: Options) -> Tensor:
    return run_forward(query, key, value, heads_like(query, value.shape[-1]), None, None, modifiers, options)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, modifiers: Modifiers, options: Options, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    output, wide, statistics = found = _outputs(query, key, value, modifiers, options, rows)
    run_forward(query, key, value, output, wide if wide.dim() > 1 else None, statistics, modifiers, options)
    return found


def _backward(
    doutput: Tensor, dlse: Tensor | None, output: Tensor, statistics: Tensor, query: Tensor, key: Tensor, value: Tensor,
    modifiers: Modifiers, options: Options, mask: Sequence[bool], deterministic: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    wanted = {name for name, needed in zip(DIFFERENTIABLE, mask, strict=True) if needed}
    inputs = {"query": query, "key": key, "value": value}
    grads = [heads_like(t, t.shape[-1]) if name in wanted else None for name, t in inputs.items()]
    others = run_backward(
        doutput, dlse, output, statistics, query, key, value, grads, modifiers, options, wanted, deterministic
    )  # fmt: skip
    return tuple(query.new_empty(0) if g is None else g for g in (*grads, *others))


def run_backward(
    doutput: Tensor, dlse: Tensor | None, output: Tensor, statistics: Tensor, query: Tensor, key: Tensor, value: Tensor,
    grads: Sequence[Tensor | None], modifiers: Modifiers, options: Options, wanted: Container[str], deterministic: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Fills `grads` of query, key and value; returns those of bias, alibi_slopes and sinks that are `wanted`."""
    q, k, v = operand(query, "query"), operand(key, "key"), operand(value, "value")
    doutput, output = operand(doutput, "gradient of the output"), operand(output, "output")
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    bias, alibi_slopes, sinks = modifiers.bias, modifiers.alibi_slopes, modifiers.sinks
    dbias = dalibi = dsinks = None
    if modifiers != PLAIN:
        modifiers = _prepared(q, k, modifiers)
        batch = q.shape[0] if modifiers.cu_seqlens_q is None else modifiers.cu_seqlens_q.numel() - 1
        if bias is not None and "bias" in wanted:
            dbias = torch.empty((1,) * (4 - bias.dim()) + bias.shape, dtype=bias.dtype, device=bias.device)
        if alibi_slopes is not None and "alibi_slopes" in wanted:
            dalibi = torch.empty((batch, q.shape[1]), dtype=torch.float32, device=q.device)
        if sinks is not None and "sinks" in wanted:
            dsinks = torch.empty((batch, q.shape[1]), dtype=torch.float32, device=q.device)
    dquery, dkey, dvalue = grads
    if dlse is not None:
        dlse = settle(dlse, "[attention] gradient of lse")
    backend.kernels[q.device.type].attention_backward(
        doutput=doutput, dlse=dlse, query=q, key=k, value=v, modifiers=modifiers, options=options, output=output,
        statistics=settle(statistics, "[attention] statistics"), dquery=dquery, dkey=dkey, dvalue=dvalue, dbias=dbias,
        dalibi_slopes=dalibi, dsinks=dsinks, deterministic=deterministic,
    )  # fmt: skip
    if bias is not None and dbias is not None:
        dbias = dbias.view(bias.shape)
    if alibi_slopes is not None and dalibi is not None:
        dalibi = (dalibi if alibi_slopes.dim() == 2 else dalibi.sum(0)).to(alibi_slopes.dtype)
    if sinks is not None and dsinks is not None:
        dsinks = dsinks.sum(0).to(sinks.dtype)
    return dbias, dalibi, dsinks


# ---- Fake


def _inference_fake(query: Tensor, key: Tensor, value: Tensor, modifiers: Modifiers, options: Options) -> Tensor:
    return heads_like(query, value.shape[-1])


def _backward_fake(
    doutput: Tensor, dlse: Tensor | None, output: Tensor, statistics: Tensor, query: Tensor, key: Tensor, value: Tensor,
    modifiers: Modifiers, options: Options, mask: Sequence[bool], deterministic: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    heads = {name: heads_like(t, t.shape[-1]) for name, t in (("query", query), ("key", key), ("value", value))}
    others = {name: None if t is None else t.new_empty(t.shape) for name, t in modifiers._asdict().items()}
    made = [(heads | others)[name] for name in DIFFERENTIABLE]
    return tuple(query.new_empty(0) if t is None or not wanted else t for t, wanted in zip(made, mask, strict=True))


# ---- Registration

_INPUTS = "Tensor query, Tensor key, Tensor value, Modifiers modifiers, Options options"
inference_op = register(f"attention({_INPUTS}) -> Tensor", _inference, _inference_fake, Modifiers, Options)
forward_op = register(
    f"attention_forward({_INPUTS}, int rows) -> (Tensor output, Tensor wide_output, Tensor statistics)",
    _forward,
    _outputs,
    Modifiers,
    Options,
)
backward_op = register(
    f"attention_backward(Tensor doutput, Tensor? dlse, Tensor output, Tensor statistics, {_INPUTS}, bool[6] mask, "
    "bool deterministic) -> "
    "(Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dbias, Tensor dalibi_slopes, Tensor dsinks)",
    _backward,
    _backward_fake,
    Modifiers,
    Options,
)

# ---- What the kernels do not take

CUDA_HEAD_SIZE = 256


def refusal(query: Tensor, value: Tensor) -> str | None:
    """Why the kernels do not take these arguments, None if they do."""
    if query.dtype not in KERNEL_DTYPES:
        return f"query of dtype {query.dtype}"
    if query.device.type == "cuda" and max(query.shape[-1], value.shape[-1]) > CUDA_HEAD_SIZE:
        return f"a head size above {CUDA_HEAD_SIZE}"
    return None
