"""rotary_embedding: query and key turned by their positions, in one call, forward, backward and in place."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchweld import backend, reference
from torchweld.ops._arguments import (
    KERNEL_DTYPES,
    check_dense,
    check_memory,
    defined,
    flag,
    integer,
    number,
)
from torchweld.ops._register import applier, elsewhere, register, settle, wants_definition, wants_grad
from torchweld.ops._rotary_checks import check_heads, check_positions, check_tables
from torchweld.reference.rotary_embedding import rotary_tables

__all__ = ["rotary_embedding", "rotary_tables"]

_NAMES = ("query", "key", "cos", "sin", "position_ids")

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
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    rotary_dim: int,
    interleaved: bool,
    inverse: bool,
    outputs: tuple[Tensor, Tensor | None],
) -> None:
    columns = rotary_dim if interleaved or cos.shape[-1] != sin.shape[-1] else 0
    cos, sin = (
        _table(cos, query, columns, "[rotary_embedding] cos"),
        _table(sin, query, columns, "[rotary_embedding] sin"),
    )
    if cos.dtype is not sin.dtype:
        cos, sin = cos.float(), sin.float()
    if position_ids is not None:
        position_ids = settle(position_ids, "[rotary_embedding] position_ids", torch.int64)
    query_output, key_output = outputs
    backend.kernels[query.device.type].rotary_embedding(
        query=query,
        key=key,
        cos=cos,
        sin=sin,
        position_ids=position_ids,
        rotary_dim=rotary_dim,
        interleaved=interleaved,
        inverse=inverse,
        query_output=query_output,
        key_output=key_output,
    )


def _rotary(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    rotary_dim: int,
    interleaved: bool,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    turned, turned_key = _rotary_fake(query, key)
    query = _readable(query, "[rotary_embedding] query")
    key = None if key is None else _readable(key, "[rotary_embedding] key")
    outputs = turned, None if key is None else turned_key
    _run(query, key, cos, sin, position_ids, rotary_dim, interleaved, inverse, outputs)
    return turned, turned_key


def _rotary_(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    rotary_dim: int,
    interleaved: bool,
    inverse: bool = False,
) -> None:
    _run(query, key, cos, sin, position_ids, rotary_dim, interleaved, inverse, (query, key))


# ---- Fake


def _output(t: Tensor, query: Tensor) -> Tensor:
    """For the result of (B, H, N, D): the order of its heads and tokens in memory is that of `t`."""
    batch, heads, tokens, dim = t.shape
    if t.stride(2) > t.stride(1):
        return query.new_empty((batch, tokens, heads, dim)).transpose(1, 2)
    return query.new_empty((batch, heads, tokens, dim))


def _rotary_fake(query: Tensor, key: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    return _output(query, query), query.new_empty(0) if key is None else _output(key, query)


def _rotary_fake_(*_: Any) -> None:
    return None


_ARGUMENTS = "Tensor cos, Tensor sin, Tensor? position_ids, int rotary_dim, bool interleaved, bool inverse=False"
_rotary_op = register(
    f"rotary_embedding(Tensor query, Tensor? key, {_ARGUMENTS}) -> (Tensor, Tensor)", _rotary, _rotary_fake
)
_rotary_op_ = register(
    f"rotary_embedding_(Tensor(a!) query, Tensor(b!)? key, {_ARGUMENTS}) -> ()", _rotary_, _rotary_fake_
)

# ---- Autograd. The gradient is turned back by the same angles; of the tensors nothing is kept.


def _of_the_inverse(sin: Tensor, rotary_dim: int, interleaved: bool) -> Tensor:
    """The sine table by which the definition turns back: negated and, of an element, that of the other in its pair."""
    if sin.shape[-1] == rotary_dim:
        pairs = sin.unflatten(-1, (-1, 2) if interleaved else (2, -1))
        sin = pairs.flip(-1 if interleaved else -2).flatten(-2)
    return -sin


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor | None, *rest: Any) -> Any:
        cos, sin, position_ids, ctx.rotary_dim, ctx.interleaved = rest
        ctx.save_for_backward(cos, sin, position_ids)
        turned, turned_key = _rotary_op(query, key, *rest)
        return turned if key is None else (turned, turned_key)

    @staticmethod
    def backward(ctx: Any, dquery: Tensor, dkey: Tensor | None = None) -> tuple[Tensor | None, ...]:
        cos, sin, position_ids = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        if wants_definition(dquery, dkey):
            definition = reference.rotary_embedding
            check_memory("backward", cos=cos, sin=sin, position_ids=position_ids)
            options = {"rotary_dim": ctx.rotary_dim, "interleaved": ctx.interleaved}
            sin = _of_the_inverse(sin, ctx.rotary_dim, ctx.interleaved)
            found = definition(dquery, dkey, cos, sin, position_ids=position_ids, **options)
            dquery, dkey = (found, None) if dkey is None else found
            return dquery if needed[0] else None, dkey if needed[1] else None, *(None,) * 5
        rest = cos, sin, position_ids, ctx.rotary_dim, ctx.interleaved, True
        if needed[0]:
            dquery, turned = _rotary_op(dquery, dkey if needed[1] else None, *rest)
            return dquery, turned if needed[1] else None, *(None,) * 5
        assert dkey is not None
        return None, _rotary_op(dkey, None, *rest)[0], *(None,) * 5


_apply = applier(_Rotary)

# ---- Public


def _refusal(query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor) -> str | None:
    """Why the kernels do not take this call; None if they do."""
    if query.dtype not in KERNEL_DTYPES:
        return f"query of dtype {query.dtype}"
    if key is not None and key.dtype is not query.dtype:
        return f"key of dtype {key.dtype} beside query of dtype {query.dtype}"
    return "a gradient of cos or sin" if wants_grad(cos, sin) else None


def _may_overwrite(t: Tensor) -> bool:
    """Whether a kernel can: heads are rows of memory, of which none overlaps another."""
    needed = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1 and stride < needed:
            return False
        needed = max(needed, stride * size)
    return (t.shape[-1] == 1 or t.stride(-1) == 1) and not t.is_neg()


def _turn(query: Tensor, key: Tensor | None, rest: tuple[Any, ...]) -> Any:  # a tensor, or a pair of them
    if wants_grad(query, key):
        return _apply(query, key, *rest)
    turned, turned_key = _rotary_op(query, key, *rest)
    return turned if key is None else (turned, turned_key)


def _overwrite(query: Tensor, key: Tensor | None, seq_dim: int, rest: tuple[Any, ...]) -> None:
    """In place; where autograd or the compiler is to see it, and where a kernel cannot, torch copies the result."""
    tensors = [t for t in (query, key) if t is not None]
    views = [t if seq_dim == -2 else t.transpose(1, 2) for t in tensors]
    if not (wants_grad(*tensors) or torch.compiler.is_compiling()) and all(map(_may_overwrite, views)):
        _rotary_op_(views[0], views[1] if key is not None else None, *rest)
        torch.autograd.graph.increment_version(tensors)
        return
    found = _turn(views[0], views[1] if key is not None else None, rest)
    for view, turned in zip(views, (found,) if key is None else found, strict=True):
        view.copy_(turned)


def rotary_embedding(
    query: Tensor,
    key: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    seq_dim: int = -2,
    inplace: bool = False,
) -> Any:  # a tensor, or a pair of them
    """Rotary position embeddings of query and key in one pass (Su et al.: arXiv:2104.09864).

    The pairs (x, z) of a head become (x cos - z sin, z cos + x sin). The backward turns the gradients back; it keeps
    the tables, and nothing of query and key.

    Args:
        query: (B, H, N, D), or (B, N, H, D) with `seq_dim=-3`, of any strides; the kernels take float32, bfloat16 and
            float16 (others run on the reference).
        key: the same but for the number of heads, or None.
        cos, sin: (N, C) or (B, N, C): row n belongs to token n. With `position_ids`, (P, C) or (B, P, C). C is
            rotary_dim, a column for each element, or half of it, a column for each pair. Any floating dtype. None: made
            from `position_ids` or 0, 1, ..., and `base`.
        position_ids: (N) or (B, N), integers: the rows of cos and sin that belong to the tokens.
        interleaved: a pair is (2 i, 2 i + 1); else (i, i + rotary_dim / 2).
        base: of the angles, position * base^(-2 i / rotary_dim) for pair i, where cos and sin are made.
        rotary_dim: how many elements of a head are turned, an even number; the others are copied. None: all.
        seq_dim: which dimension counts the tokens, -2 or -3.
        inplace: query and key themselves are overwritten, and returned.

    Returns:
        query's turned tensor, with its strides; with a key, the pair of both.

    Raises:
        RuntimeError: a shape or device does not fit; inplace for a leaf that requires a gradient.
        TypeError: a tensor is not floating point of 16 bits or more, or no dense one; cos without sin.
        ValueError: a position is none of the tables' rows; a number is out of range. On a GPU an assertion ends the
            kernel at such a position: the host does not know the values.
    """
    op = "rotary_embedding"
    interleaved, inplace, base = (
        flag(op, "interleaved", interleaved),
        flag(op, "inplace", inplace),
        number(op, "base", base),
    )
    seq_dim = integer(op, "seq_dim", seq_dim)
    tensors = (query, key, cos, sin, position_ids)
    if theirs := elsewhere(rotary_embedding, None, _NAMES, *tensors):
        options = {"interleaved": interleaved, "base": base, "rotary_dim": rotary_dim, "seq_dim": seq_dim}
        return theirs(query, key, cos, sin, position_ids=position_ids, inplace=inplace, **options)
    if query is None:
        check_dense(op, query=query)
    if seq_dim not in (-2, -3, 1, 2):
        raise ValueError(f"[{op}] seq_dim: expected -2 or -3, but got {seq_dim}")
    seq_dim = -3 if seq_dim in (1, -3) else -2
    check_heads(op, query, key, seq_dim)
    size = query.shape[-1] if rotary_dim is None else integer(op, "rotary_dim", rotary_dim)
    if size % 2 or not 2 <= size <= query.shape[-1]:
        raise ValueError(f"[{op}] rotary_dim: expected an even number from 2 to {query.shape[-1]}, but got {size}")
    if (cos is None) != (sin is None):
        missing = "cos" if cos is None else "sin"
        raise TypeError(f"[{op}] {missing}: expected a torch.Tensor beside the other table, but got None")
    tokens = query.shape[seq_dim]
    if position_ids is not None:
        check_positions(op, query, position_ids, seq_dim)
    if cos is None or sin is None:
        if not base > 0:
            raise ValueError(f"[{op}] base: expected a number above 0, but got {base}")
        ids = torch.arange(tokens, device=query.device) if position_ids is None else position_ids
        (cos, sin), position_ids = rotary_tables(ids, size, base), None
    else:
        check_tables(op, query, cos, sin, tokens if position_ids is None else None, size)
    refusal = _refusal(query, key, cos, sin)
    if backend.choose(op, query.device, refusal) == "reference":
        named = dict(zip(_NAMES, (query, key, cos, sin, position_ids), strict=True))
        call = partial(
            reference.rotary_embedding,
            position_ids=position_ids,
            interleaved=interleaved,
            rotary_dim=size,
            seq_dim=seq_dim,
            inplace=inplace,
        )
        return defined(call, op, named, query, key, cos, sin)
    rest = cos, sin, position_ids, size, interleaved
    if inplace:
        _overwrite(query, key, seq_dim, rest)
        return query if key is None else (query, key)
    if seq_dim == -2:
        return _turn(query, key, rest)
    found = _turn(query.transpose(1, 2), None if key is None else key.transpose(1, 2), rest)
    return found.transpose(1, 2) if isinstance(found, Tensor) else (found[0].transpose(1, 2), found[1].transpose(1, 2))
