"""rotary_embedding: query and key turned by their positions, in one call, forward, backward and in place."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchweld import backend, reference
from torchweld.ops._arguments import KERNEL_DTYPES, check_dense, defined, flag, integer, number
from torchweld.ops._register import elsewhere, wants_grad
from torchweld.ops._rotary import Rotation, Tables, new_record, rotary_function, rotary_op, rotary_op_
from torchweld.ops._rotary_checks import check_heads, check_positions, check_tables
from torchweld.reference.rotary_embedding import rotary_tables

__all__ = ["rotary_embedding", "rotary_tables"]

_NAMES = ("query", "key", "cos", "sin", "position_ids")


def _refusal(query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor) -> str | None:
    """Why the kernels do not take this call; None if they do."""
    if query.dtype not in KERNEL_DTYPES:
        return f"query of dtype {query.dtype}"
    if key is not None and key.dtype is not query.dtype:
        return f"key of dtype {key.dtype} beside query of dtype {query.dtype}"
    return "a gradient of cos or sin" if wants_grad(cos, sin) else None


def _may_overwrite(t: Tensor) -> bool:
    """Whether a kernel can turn `t` in place: heads are rows of neighbours in memory, and no two of them overlap."""
    needed = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1 and stride < needed:
            return False
        needed = max(needed, stride * size)
    return (t.shape[-1] == 1 or t.stride(-1) == 1) and not t.is_neg()


def _turn(query: Tensor, key: Tensor | None, tables: Tables, rotation: Rotation) -> Any:  # a tensor, or a pair of them
    if wants_grad(query, key):
        return rotary_function(query, key, *tables, rotation)
    turned, turned_key = rotary_op(query, key, tables, rotation)
    return turned if key is None else (turned, turned_key)


def _overwrite(query: Tensor, key: Tensor | None, seq_dim: int, tables: Tables, rotation: Rotation) -> None:
    """Turns both in place. Torch copies the result where autograd or the compiler records that, or a kernel cannot."""
    tensors = [t for t in (query, key) if t is not None]
    views = [t if seq_dim == -2 else t.transpose(1, 2) for t in tensors]
    if not (wants_grad(*tensors) or torch.compiler.is_compiling()) and all(map(_may_overwrite, views)):
        rotary_op_(views[0], views[1] if key is not None else None, tables, rotation)
        torch.autograd.graph.increment_version(tensors)
        return
    found = _turn(views[0], views[1] if key is not None else None, tables, rotation)
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
    interleaved, inplace = flag(op, "interleaved", interleaved), flag(op, "inplace", inplace)
    base, seq_dim = number(op, "base", base), integer(op, "seq_dim", seq_dim)
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
    tables, rotation = new_record(Tables, (cos, sin, position_ids)), new_record(Rotation, (size, interleaved, False))
    if inplace:
        _overwrite(query, key, seq_dim, tables, rotation)
        return query if key is None else (query, key)
    if seq_dim == -2:
        return _turn(query, key, tables, rotation)
    found = _turn(query.transpose(1, 2), None if key is None else key.transpose(1, 2), tables, rotation)
    return found.transpose(1, 2) if isinstance(found, Tensor) else (found[0].transpose(1, 2), found[1].transpose(1, 2))
