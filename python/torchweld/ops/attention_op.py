"""The registered ops behind `torchweld.ops.attention`: implementation, fake and autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchweld import backend, reference
from torchweld.ops.library import applier, double_backward, register, wants_definition

ALIGNMENTS = ("top_left", "bottom_right")

# ---- Implementation. The kernels read any strides but the last; they fill what is allocated here.


def _operand(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _heads_like(query: Tensor, size: int) -> Tensor:
    """(B, H, N, size), in memory (B, N, H, size) where query is so: merging the heads afterwards is then free."""
    batch, heads, rows, query_size = query.shape
    if size == query_size and query.is_contiguous():
        return torch.empty_like(query)
    if query.stride(1) < query.stride(2):
        strides = (rows * heads * size, size, heads * size, 1)
    else:
        strides = (heads * rows * size, rows * size, size, 1)
    return torch.empty_strided((batch, heads, rows, size), strides, dtype=query.dtype, device=query.device)


def _modifiers(
    query: Tensor, key: Tensor, bias: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As the kernels want them: (B, H, Nq, Nk), float32 (B, H), float32 (H); broadcast by stride 0, without copies."""
    batch, heads, rows, _ = query.shape
    if bias is not None:
        bias = (bias if bias.stride(-1) <= 1 else bias.contiguous()).expand(batch, heads, rows, key.shape[2])
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.float().contiguous().expand(batch, heads)
    return bias, alibi_slopes, None if sinks is None else sinks.float().contiguous()


def _run_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    lse: Tensor | None,
    *scores: Any,
) -> Tensor:
    q, k, v = _operand(query), _operand(key), _operand(value)
    if bias is not None or alibi_slopes is not None or sinks is not None:
        bias, alibi_slopes, sinks = _modifiers(q, k, bias, alibi_slopes, sinks)
    output, device = _heads_like(query, value.shape[3]), q.device
    kernels = backend.kernels[device.type]
    size = kernels.attention_forward_workspace(q, k, v, lse)
    workspace = torch.empty(size, dtype=torch.float32, device=device)
    kernels.attention_forward(q, k, v, bias, alibi_slopes, sinks, *scores, output, lse, workspace)
    return output


def _inference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    *scores: Any,
) -> Tensor:
    return _run_forward(query, key, value, bias, alibi_slopes, sinks, None, *scores)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    *scores: Any,
) -> tuple[Tensor, Tensor]:
    batch, heads, rows, _ = query.shape
    lse = query.new_empty((batch, heads, rows), dtype=torch.float32)
    return _run_forward(query, key, value, bias, alibi_slopes, sinks, lse, *scores), lse


def _backward(
    doutput: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    output: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float,
    left: int,
    right: int,
    bottom_right: bool,
    mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, doutput = _operand(query), _operand(key), _operand(value), _operand(doutput)
    dquery, dkey, dvalue = (
        _heads_like(t, t.shape[3]) if wanted else None for t, wanted in zip((query, key, value), mask, strict=False)
    )
    dbias = dsinks = None
    if bias is not None and mask[3]:
        dbias = torch.empty((1,) * (4 - bias.dim()) + bias.shape, dtype=bias.dtype, device=bias.device)
    if sinks is not None and mask[4]:
        dsinks = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    full_bias, slopes, sink = _modifiers(q, k, bias, alibi_slopes, sinks)
    kernels = backend.kernels[q.device.type]
    size = kernels.attention_backward_workspace(q, k, v, doutput)
    kernels.attention_backward(
        doutput,
        None if dlse is None else dlse.contiguous(),
        q,
        k,
        v,
        full_bias,
        slopes,
        sink,
        _operand(output),
        lse,
        scale,
        softcap,
        left,
        right,
        bottom_right,
        dquery,
        dkey,
        dvalue,
        dbias,
        dsinks,
        torch.empty(size, dtype=torch.float32, device=q.device),
    )
    none = query.new_empty(0)
    return (
        none if dquery is None else dquery,
        query.new_empty(0) if dkey is None else dkey,
        query.new_empty(0) if dvalue is None else dvalue,
        query.new_empty(0) if dbias is None or bias is None else dbias.view(bias.shape),
        query.new_empty(0) if dsinks is None or sinks is None else dsinks.sum(0).to(sinks.dtype),
    )


# ---- Fake


def _inference_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return _heads_like(query, value.shape[3])


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _heads_like(query, value.shape[3]), query.new_empty(query.shape[:3], dtype=torch.float32)


def _backward_fake(
    doutput: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    mask = rest[-1]

    def flat(t: Tensor | None, wanted: bool) -> Tensor:
        return query.new_empty(0) if t is None or not wanted else t.new_empty(t.shape)

    heads = (
        _heads_like(t, t.shape[3]) if wanted else query.new_empty(0)
        for t, wanted in zip((query, key, value), mask, strict=False)
    )
    return *heads, flat(bias, mask[3]), flat(sinks, mask[4])


_SCORES = "float scale, float softcap, SymInt left, SymInt right, bool bottom_right"
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? alibi_slopes, Tensor? sinks"

inference_op = register(f"attention({_INPUTS}, {_SCORES}) -> Tensor", _inference, _inference_fake)
forward_op = register(
    f"attention_forward({_INPUTS}, {_SCORES}) -> (Tensor output, Tensor lse)", _forward, _forward_fake
)
_backward_op = register(
    f"attention_backward(Tensor doutput, Tensor? dlse, {_INPUTS}, Tensor output, Tensor lse, {_SCORES}, bool[5] mask)"
    " -> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dbias, Tensor dsinks)",
    _backward,
    _backward_fake,
)

# ---- Autograd


def on_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float,
    scale: float,
    softcap: float,
    left: int,
    right: int,
    bottom_right: bool,
) -> tuple[Tensor, ...]:
    """(out, lse) by the definition, from the arguments of the ops."""
    result = reference.attention(
        query,
        key,
        value,
        window=(None if left < 0 else left, None if right < 0 else right),
        softcap=softcap,
        bias=bias,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        scale=scale,
        causal_align=ALIGNMENTS[bottom_right],
        return_lse=True,
    )
    assert isinstance(result, tuple)
    return result


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        alibi_slopes: Tensor | None,
        sinks: Tensor | None,
        *scores: Any,
    ) -> tuple[Tensor, Tensor]:
        output, lse = forward_op(query, key, value, bias, alibi_slopes, sinks, *scores)
        ctx.save_for_backward(query, key, value, bias, alibi_slopes, sinks, output, lse)
        ctx.scores = scores
        ctx.set_materialize_grads(False)
        return output, lse

    @staticmethod
    def backward(ctx: Any, doutput: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, bias, alibi_slopes, sinks, output, lse = ctx.saved_tensors
        need = ctx.needs_input_grad
        mask = (*need[:4], need[5])
        if wants_definition(doutput, dlse):

            def function(
                q: Tensor, k: Tensor, v: Tensor, b: Tensor | None, s: Tensor | None
            ) -> Tensor | tuple[Tensor, ...]:
                return on_reference(q, k, v, b, alibi_slopes, s, 0.0, *ctx.scores)

            grads = double_backward(function, (query, key, value, bias, sinks), (doutput, dlse), mask)
        else:
            if doutput is None:  # only lse was used
                doutput = torch.zeros_like(output)
            grads = _backward_op(
                doutput, dlse, query, key, value, bias, alibi_slopes, sinks, output, lse, *ctx.scores, mask
            )
        dq, dk, dv, db, ds = (g if wanted else None for g, wanted in zip(grads, mask, strict=True))
        return dq, dk, dv, db, None, ds, None, None, None, None, None


attention_with_grad = applier(_Attention)
