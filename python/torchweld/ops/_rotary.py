"""The registered ops behind rotary_embedding, and their gradients: implementation, fake and autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchweld import backend, reference
from torchweld.ops._arguments import check_memory
from torchweld.ops._register import applier, differentiate, register, settle, wants_definition, wants_grad


class Tables(NamedTuple):
    """What turns the tokens: row `position_ids[b, n]` of cos and sin, or row n."""

    cos: Tensor
    sin: Tensor
    position_ids: Tensor | None


class Rotation(NamedTuple):
    """Which elements of a head are turned; `inverse` turns them back."""

    rotary_dim: int
    interleaved: bool
    inverse: bool = False


new_record = tuple.__new__  # makes a record 0.4 us faster than its constructor


# ---- Implementation. The kernels see (B, H, N, D) of any strides, with neighbours along the last dimension.


def _readable(t: Tensor, at: str) -> Tensor:
    return t if (t.shape[-1] == 1 or t.stride(-1) == 1) and not t.is_neg() else settle(t, at)


def _table(t: Tensor, query: Tensor, columns: int, at: str) -> Tensor:
    """As a kernel reads it: contiguous, float32 or of query's dtype, with so many columns at least."""
    t = settle(t, at, None if t.dtype is query.dtype else torch.float32)
    if t.dim() == 3 and t.shape[0] == 1:
        t = t[0]
    return t if t.shape[-1] >= columns else t.repeat_interleave(2, -1)


def _run(
    query: Tensor,
    key: Tensor | None,
    tables: Tables,
    rotation: Rotation,
    query_output: Tensor,
    key_output: Tensor | None,
) -> None:
    cos, sin, ids = tables
    columns = rotation.rotary_dim if rotation.interleaved or cos.shape[-1] != sin.shape[-1] else 0
    cos = _table(cos, query, columns, "[rotary_embedding] cos")
    sin = _table(sin, query, columns, "[rotary_embedding] sin")
    if cos.dtype is not sin.dtype:
        cos, sin = cos.float(), sin.float()
    if ids is not None:
        ids = settle(ids, "[rotary_embedding] position_ids", torch.int64)
    backend.kernels[query.device.type].rotary_embedding(
        query=query,
        key=key,
        tables=new_record(Tables, (cos, sin, ids)),
        rotation=rotation,
        query_output=query_output,
        key_output=key_output,
    )


def _rotary(query: Tensor, key: Tensor | None, tables: Tables, rotation: Rotation) -> tuple[Tensor, Tensor]:
    turned, turned_key = _rotary_fake(query, key)
    query = _readable(query, "[rotary_embedding] query")
    key = None if key is None else _readable(key, "[rotary_embedding] key")
    _run(query, key, tables, rotation, turned, None if key is None else turned_key)
    return turned, turned_key


def _rotary_(query: Tensor, key: Tensor | None, tables: Tables, rotation: Rotation) -> None:
    _run(query, key, tables, rotation, query, key)


# ---- Fake


def _output(t: Tensor, query: Tensor) -> Tensor:
    """For the result of (B, H, N, D): the order of its heads and tokens in memory is that of `t`."""
    batch, heads, tokens, dim = t.shape
    if t.stride(2) > t.stride(1):
        return query.new_empty(batch, tokens, heads, dim).transpose(1, 2)  # sizes in a tuple cost 0.4 us
    return query.new_empty(batch, heads, tokens, dim)


def _rotary_fake(query: Tensor, key: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    return _output(query, query), query.new_empty(0) if key is None else _output(key, query)


def _rotary_fake_(*_: Any) -> None:
    return None


rotary_op = register(
    "rotary_embedding(Tensor query, Tensor? key, Tables tables, Rotation rotation) -> (Tensor, Tensor)",
    _rotary,
    _rotary_fake,
    Tables,
    Rotation,
)
rotary_op_ = register(
    "rotary_embedding_(Tensor(a!) query, Tensor(b!)? key, Tables tables, Rotation rotation) -> ()",
    _rotary_,
    _rotary_fake_,
    Tables,
    Rotation,
)

# ---- Autograd. The gradient is turned back by the same angles; of the tensors nothing is kept.


def _of_the_inverse(sin: Tensor, rotary_dim: int, interleaved: bool) -> Tensor:
    """The sine table that makes the definition turn back: negated, and with a column per element swapped in pairs."""
    if sin.shape[-1] == rotary_dim:
        pairs = sin.unflatten(-1, (-1, 2) if interleaved else (2, -1))
        sin = pairs.flip(-1 if interleaved else -2).flatten(-2)
    return -sin


def _by_definition(query: Tensor, key: Tensor | None, tables: Tables, rotation: Rotation) -> Any:
    sin = tables.sin
    if rotation.inverse:
        sin = _of_the_inverse(sin, rotation.rotary_dim, rotation.interleaved)
    return reference.rotary_embedding(
        query,
        key,
        tables.cos,
        sin,
        position_ids=tables.position_ids,
        rotary_dim=rotation.rotary_dim,
        interleaved=rotation.interleaved,
    )


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        position_ids: Tensor | None,
        rotation: Rotation,
    ) -> Any:
        ctx.save_for_backward(cos, sin, position_ids)
        ctx.rotation = rotation
        turned, turned_key = rotary_op(query, key, new_record(Tables, (cos, sin, position_ids)), rotation)
        return turned if key is None else (turned, turned_key)

    @staticmethod
    def backward(ctx: Any, dquery: Tensor, dkey: Tensor | None = None) -> tuple[Tensor | None, ...]:
        tables, rotation = Tables(*ctx.saved_tensors), ctx.rotation
        wanted, wanted_key = ctx.needs_input_grad[:2]
        back = rotation._replace(inverse=not rotation.inverse)
        if wants_definition(dquery, dkey):
            check_memory("backward", **tables._asdict())
            found = _by_definition(dquery, dkey, tables, back)
            dquery, dkey = (found, None) if dkey is None else found
        elif wanted:
            dquery, dkey = rotary_op(dquery, dkey if wanted_key else None, tables, back)
        else:
            assert dkey is not None
            dkey = rotary_op(dkey, None, tables, back)[0]
        return dquery if wanted else None, dkey if wanted_key else None, *(None,) * (len(tables) + 1)


rotary_function = applier(_Rotary)


def _both(query: Tensor, key: Tensor | None, tables: Tables, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """The op's outputs. The definition serves tables that want a gradient."""
    by_kernels = not wants_grad(tables.cos, tables.sin)
    found = (
        rotary_function(query, key, *tables, rotation) if by_kernels else _by_definition(query, key, tables, rotation)
    )
    return (found, query.new_empty(0)) if key is None else found


differentiate("rotary_embedding", _both)
