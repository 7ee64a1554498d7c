"""The registered ops behind `torchweld.ops.attention`: implementation, fake, autograd, and the choice of the backend.

All of them take query, key and value, then the tensors of `Modifiers` and then the numbers of `Options`. With
cu_seqlens, (B, H, N, D) is (total, H, D) and (B, H, Nq) is (H, total_q): packed sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchweld import backend, reference
from torchweld.ops._arguments import KERNEL_DTYPES, defined
from torchweld.ops._register import (
    applier,
    double_backward,
    register,
    settle,
    wants_definition,
    wants_grad,
)

ALIGNMENTS = ("top_left", "bottom_right")


class Modifiers(NamedTuple):
    """The tensors that every op takes after query, key and value."""

    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    seed: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None


class Options(NamedTuple):
    """The numbers that follow them. -1: no bound, or a length that is not known."""

    scale: float
    softcap: float
    left: int
    right: int
    bottom_right: bool
    dropout_p: float
    max_seqlen_q: int
    max_seqlen_k: int


_COUNT = len(Modifiers._fields)
PLAIN = Modifiers()
_GRADS = 6  # of query, key, value, bias, alibi_slopes and sinks

# ---- Implementation. The kernels read any strides but the last; they fill what is allocated here.


def operand(t: Tensor, name: str) -> Tensor:
    return t if t.stride(-1) == 1 and not t.is_neg() else settle(t, f"[attention] {name}")


def heads_like(query: Tensor, size: int) -> Tensor:
    """(B, H, N, size), in memory (B, N, H, size) where query is so: merging the heads afterwards is then free."""
    if size == query.shape[-1] and query.is_contiguous():
        return torch.empty_like(query)
    if query.dim() == 3:
        return query.new_empty((*query.shape[:2], size))
    batch, heads, rows, _ = query.shape
    if query.stride(1) < query.stride(2):
        strides = (rows * heads * size, size, heads * size, 1)
    else:
        strides = (heads * rows * size, rows * size, size, 1)
    return torch.empty_strided((batch, heads, rows, size), strides, dtype=query.dtype, device=query.device)


def row_statistics(query: Tensor, rows: int) -> Tensor:
    """float32 (rows, B, H, Nq), packed (rows, H, total_q).

    1 row: lse; 2: what the backward makes the softmax of, which lse is too rounded for; 3: those, then lse.
    """
    shape = query.shape[:3] if query.dim() == 4 else query.shape[1::-1]
    return query.new_empty((rows, *shape), dtype=torch.float32)


def _prepared(query: Tensor, key: Tensor, modifiers: Modifiers) -> Modifiers:
    """As the kernels want them: (B, H, Nq, Nk), float32 (B, H), float32 (H); broadcast by stride 0, without copies."""
    bias, alibi_slopes, sinks, seed, lens_q, lens_k = modifiers
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
    return Modifiers(bias, alibi_slopes, sinks, seed, lens_q, lens_k)


def run_forward(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, statistics: Tensor | None, rest: tuple[Any, ...]
) -> Tensor:
    """`output`, filled. `rest`: modifiers and options."""
    q, k, v = operand(query, "query"), operand(key, "key"), operand(value, "value")
    modifiers, options = rest[:_COUNT], rest[_COUNT:]
    if modifiers != PLAIN:  # None is compared by identity: cheap
        modifiers = _prepared(q, k, Modifiers(*modifiers))
    kernels = backend.kernels[q.device.type]
    size = kernels.attention_forward_workspace(q, k, v, modifiers[-2], modifiers[-1], statistics)
    workspace = torch.empty(size, dtype=torch.float32, device=q.device)
    kernels.attention_forward(q, k, v, modifiers, options, output, statistics, workspace)
    return output


def _inference(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    return run_forward(query, key, value, heads_like(query, value.shape[-1]), None, rest)


def _forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    statistics = row_statistics(query, rest[-1])
    return run_forward(query, key, value, heads_like(query, value.shape[-1]), statistics, rest[:-1]), statistics


def _backward(
    doutput: Tensor, dlse: Tensor | None, output: Tensor, statistics: Tensor, query: Tensor, key: Tensor, value: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    mask = rest[-2]
    grads = [
        heads_like(t, t.shape[-1]) if wanted else None for t, wanted in zip((query, key, value), mask, strict=False)
    ]
    others = run_backward(doutput, dlse, output, statistics, query, key, value, grads, rest)
    return tuple(query.new_empty(0) if g is None else g for g in (*grads, *others))


def run_backward(
    doutput: Tensor, dlse: Tensor | None, output: Tensor, statistics: Tensor, query: Tensor, key: Tensor, value: Tensor,
    grads: Sequence[Tensor | None], rest: tuple[Any, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Fills `grads` of query, key and value; returns those of bias, alibi_slopes and sinks. `rest`: see `_backward`."""
    q, k, v = operand(query, "query"), operand(key, "key"), operand(value, "value")
    doutput, output = operand(doutput, "gradient of the output"), operand(output, "output")
    modifiers, options, (mask, deterministic) = Modifiers(*rest[:_COUNT]), rest[_COUNT:-2], rest[-2:]
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    bias, alibi_slopes, sinks = modifiers[:3]
    dbias = dalibi = dsinks = None
    if modifiers != PLAIN:
        modifiers = _prepared(q, k, modifiers)
        batch = q.shape[0] if modifiers.cu_seqlens_q is None else modifiers.cu_seqlens_q.numel() - 1
        if bias is not None and mask[3]:
            dbias = torch.empty((1,) * (4 - bias.dim()) + bias.shape, dtype=bias.dtype, device=bias.device)
        if alibi_slopes is not None and mask[4]:
            dalibi = torch.empty((batch, q.shape[1]), dtype=torch.float32, device=q.device)
        if sinks is not None and mask[5]:
            dsinks = torch.empty((batch, q.shape[1]), dtype=torch.float32, device=q.device)
    kernels = backend.kernels[q.device.type]
    size = kernels.attention_backward_workspace(
        q, k, v, modifiers.cu_seqlens_q, modifiers.cu_seqlens_k, doutput, deterministic
    )
    workspace = torch.empty(size, dtype=torch.float32, device=q.device)
    dquery, dkey, dvalue = grads
    if dlse is not None:
        dlse = settle(dlse, "[attention] gradient of lse")
    kernels.attention_backward(
        doutput, dlse, q, k, v, modifiers, options, output, settle(statistics, "[attention] statistics"),
        dquery, dkey, dvalue, dbias, dalibi, dsinks, deterministic, workspace,
    )  # fmt: skip
    if bias is not None and dbias is not None:
        dbias = dbias.view(bias.shape)
    if alibi_slopes is not None and dalibi is not None:
        dalibi = (dalibi if alibi_slopes.dim() == 2 else dalibi.sum(0)).to(alibi_slopes.dtype)
    if sinks is not None and dsinks is not None:
        dsinks = dsinks.sum(0).to(sinks.dtype)
    return dbias, dalibi, dsinks


# ---- Fake


def _inference_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return heads_like(query, value.shape[-1])


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return heads_like(query, value.shape[-1]), row_statistics(query, rest[-1])


def _backward_fake(
    doutput: Tensor, dlse: Tensor | None, output: Tensor, statistics: Tensor, query: Tensor, key: Tensor, value: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    mask = rest[-2]
    heads = (heads_like(t, t.shape[-1]) if m else query.new_empty(0) for t, m in zip((query, key, value), mask))  # noqa: B905
    others = (query.new_empty(0) if t is None or not m else t.new_empty(t.shape) for t, m in zip(rest, mask[3:]))  # noqa: B905
    return *heads, *others


# ---- Registration

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, Tensor? seed, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, float scale, float softcap, SymInt left, SymInt right, "
    "bool bottom_right, float dropout_p, SymInt max_seqlen_q, SymInt max_seqlen_k"
)
inference_op = register(f"attention({_INPUTS}) -> Tensor", _inference, _inference_fake)
forward_op = register(
    f"attention_forward({_INPUTS}, int rows) -> (Tensor output, Tensor statistics)", _forward, _forward_fake
)
_backward_op = register(
    f"attention_backward(Tensor doutput, Tensor? dlse, Tensor output, Tensor statistics, {_INPUTS}, bool[6] mask, "
    "bool deterministic) -> "
    "(Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dbias, Tensor dalibi_slopes, Tensor dsinks)",
    _backward,
    _backward_fake,
)

# ---- Autograd


def _on_reference(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """(out, lse) by the definition, from the arguments of the ops."""
    modifiers, options = Modifiers(*rest[:_COUNT]), Options(*rest[_COUNT:])
    left, right = options.left, options.right
    result = reference.attention(
        query,
        key,
        value,
        window=(None if left < 0 else left, None if right < 0 else right),
        softcap=options.softcap,
        dropout_p=options.dropout_p,
        scale=options.scale,
        causal_align=ALIGNMENTS[options.bottom_right],
        return_lse=True,
        **modifiers._asdict(),
    )
    assert isinstance(result, tuple)
    return result


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: tuple[Any, ...], *inputs: Any) -> Tensor | tuple[Tensor, Tensor]:
        # One argument, the last of them `deterministic` and `return_lse`: each costs a call as much as a tensor.
        ctx.options, (ctx.deterministic, return_lse) = options[:-2], options[-2:]
        output, statistics = forward_op(*inputs, *ctx.options, 3 if return_lse else 2)
        ctx.save_for_backward(output, statistics, *inputs)
        ctx.set_materialize_grads(False)
        return (output, statistics[2]) if return_lse else output

    @staticmethod
    def backward(ctx: Any, doutput: Tensor | None, dlse: Tensor | None = None) -> tuple[Tensor | None, ...]:
        output, statistics, *inputs = ctx.saved_tensors
        mask = ctx.needs_input_grad[1 : 1 + _GRADS]
        if wants_definition(doutput, dlse):

            def function(*leaves: Any) -> tuple[Tensor, ...]:
                return _on_reference(*leaves, *inputs[_GRADS:], *ctx.options)

            grads = double_backward(function, inputs[:_GRADS], (doutput, dlse), mask)
        else:
            if doutput is None:  # only lse was used
                doutput = torch.zeros_like(output)
            grads = _backward_op(doutput, dlse, output, statistics, *inputs, *ctx.options, mask, ctx.deterministic)
        found = [g if wanted else None for g, wanted in zip(grads, mask, strict=True)]
        return None, *found, None, None, None


_attention_with_grad = applier(_Attention)

# ---- Backend

CUDA_HEAD_SIZE = 256


def refusal(query: Tensor, value: Tensor) -> str | None:
    """Why the kernels do not take these arguments, None if they do."""
    if query.dtype not in KERNEL_DTYPES:
        return f"query of dtype {query.dtype}"
    if query.device.type == "cuda" and max(query.shape[-1], value.shape[-1]) > CUDA_HEAD_SIZE:
        return f"a head size above {CUDA_HEAD_SIZE}"
    return None


def attend(
    op: str,
    return_lse: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    modifiers: tuple[Tensor | None, ...],
    *options: Any,
    deterministic: bool = True,
) -> Any:
    """output or (output, lse) of checked arguments, by whichever backend serves them. `options`: those of `Options`."""
    if backend.choose(op, query.device, refusal(query, value)) == "reference":
        tensors = {"query": query, "key": key, "value": value, **Modifiers(*modifiers)._asdict()}
        both = defined(_on_reference, op, tensors, query, key, value, *modifiers, *options)
        return both if return_lse else both[0]
    if wants_grad(query, key, value, *modifiers[: _GRADS - 3]):
        return _attention_with_grad((*options, deterministic, return_lse), query, key, value, *modifiers)
    if return_lse:
        output, statistics = forward_op(query, key, value, *modifiers, *options, 1)
        return output, statistics[0]
    return inference_op(query, key, value, *modifiers, *options)
