"""Draws cases of attention: dense, packed, paged, decoding, and torch's own signature."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchweld import ops, reference
from torchweld.testing.attention_case import AttentionCase
from torchweld.testing.attention_packed import PackedAttentionCase
from torchweld.testing.case import Tensors
from torchweld.testing.fuzz.draw import FEW, FLOATS, HIDING, LONG, MANY, TILES, VECTORS, Draw
from torchweld.testing.fuzz.trial import Judged
from torchweld.testing.inputs import HIDDEN, VALUES
from torchweld.testing.paged_attention import PagedAttentionCase

_FAR_VALUES = ("shifted", "one outlier", "one huge row")
_MOST = 1 << 17  # scores of a case; more scores only take longer in float64


@dataclass(frozen=True, kw_only=True)
class SdpaCase(AttentionCase):
    """A call with torch's signature. `dims`: of query, 2 to 5; `shared`: key and value broadcast from one batch."""

    dims: int = 4
    shared: bool = False

    @property
    def op(self) -> str:
        return "scaled_dot_product_attention"

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Tensors:
        x = super().inputs(dtype, device, seed)
        return x | {n: x[n][:1] for n in ("key", "value") if self.shared}

    def _call(self, of: Any, x: Tensors) -> Tensors:
        query, key, value, mask = (x.get(n) for n in ("query", "key", "value", "bias"))
        assert query is not None and key is not None and value is not None
        if self.dims < 4:
            query, key, value = (t.flatten(0, 3 - self.dims) for t in (query, key, value))
            mask = None if mask is None else mask.flatten(0, max(mask.dim() - self.dims, 0))
        elif self.dims == 5:
            query, key, value = (t.unsqueeze(1) for t in (query, key, value))
            mask = None if mask is None else mask.unsqueeze(1) if mask.dim() == 4 else mask
        out = of.scaled_dot_product_attention(
            query, key, value, mask, 0.0, self.causal, scale=self.scale, enable_gqa=self.kv_heads is not None
        )
        return {"output": out.view(self.batch, self.heads, self.queries, self.value_dim or self.dim)}

    def ours(self, x: Tensors) -> Tensors:
        return self._call(ops, x)

    def reference(self, x: Tensors) -> Tensors:
        return self._call(reference, x)

    def torch(self, x: Tensors) -> Tensors:
        """In four dimensions, which its kernels of 16 bits want; in others it is in float32 from end to end."""
        return super().torch(x | {n: x[n].expand(self.batch, -1, -1, -1) for n in ("key", "value")})

    def terms(self, x: Tensors) -> Mapping[str, Tensor | float]:
        terms = super().terms(x)
        shared = {n: torch.as_tensor(terms[n]).sum_to_size(x[n[1:]].shape) for n in ("dkey", "dvalue") if self.shared}
        return {**terms, **shared}

    def zeros(self, x: Tensors) -> Tensors:
        zeros = super().zeros(x)
        return zeros | {n: zeros[n].all(0, keepdim=True) for n in ("dkey", "dvalue") if self.shared}


def _bias(draw: Draw, sizes: dict[str, Any]) -> tuple[int, ...]:
    heads, rows = (sizes["batch"], sizes["heads"]), (sizes["queries"], sizes["keys"])
    # A bias that is the same for all keys has no gradient; of 16 bits, what output is rounded to would be left of it.
    shape = [n if draw.chance(0.6) else 1 for n in (*heads, rows[0])] + [rows[1]]
    return tuple(shape[draw.one(0, 0, 0, 1, 2) :])


def _sizes(draw: Draw) -> dict[str, Any]:
    queries = draw.size(FEW, VECTORS, TILES, MANY)
    keys = draw.one(queries, draw.size(FEW, VECTORS, TILES, MANY), draw.size(TILES, MANY, LONG))
    heads, batch = draw.one(1, 1, 2, 3, 4, 8), draw.one(1, 1, 1, 2, 3)
    while heads * batch > 1 and heads * batch * queries * keys > _MOST:
        heads, batch = max(heads // 2, 1), max(batch - 1, 1)
    if queries * keys > 2 * _MOST:
        queries = draw.one(*FEW)
    return {"queries": queries, "keys": keys, "heads": heads, "batch": batch, "dim": _dim(draw)}


def _dim(draw: Draw) -> int:
    return draw.one(64, 64, 128, 1, 3, 7, 8, 16, 17, 31, 32, 33, 40, 80, 96, 129, 160, 256, 257)


def _band(draw: Draw) -> dict[str, Any]:
    left, right = (draw.one(None, 0, 1, 5, 16, 63, 64, 200, 10**6) for _ in range(2))
    return {"window": (left, right)}


def _kv(draw: Draw, sizes: dict[str, Any]) -> dict[str, Any]:
    return {"kv_heads": draw.one(*(n for n in (1, 2, 3, 4, 8) if sizes["heads"] % n == 0))}


def _modifiers(draw: Draw, sizes: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The options that all kinds of attention share."""
    half = dtype is torch.float16
    logits = (20.0, 300.0) if half else (20.0, 300.0, 1e4, 1e9)
    # Of constants all errors are alike, torch's as well as ours: as much a matter of luck as a single element.
    values = [v for v in VALUES if "constant" not in v and not (half and v in _FAR_VALUES)]
    return {
        "causal": lambda: {"causal": True},
        "causal at the end": lambda: {"causal": True, "bottom_right": True},
        "window": lambda: _band(draw) | {"bottom_right": draw.chance(0.5)},
        "softcap": lambda: {"softcap": draw.one(0.1, 5.0, 30.0, 1e3), "logits": draw.one(1.0, *logits)},
        "alibi": lambda: {"alibi": True, "slopes_by_batch": draw.chance(0.3)},
        "sinks": lambda: {"sinks": True},
        "lse": lambda: {"lse": True},
        "logits": lambda: {"logits": draw.one(0.01, *logits)},
        "values": lambda: {"values": draw.one(*values)},
        "heads": lambda: _kv(draw, sizes),
        "values' size": lambda: {"value_dim": _dim(draw)},
        "layout": lambda: draw.one({"merged": True}, {"layout": draw.one("unaligned", "strided", "transposed")}),
    }


def _dense(draw: Draw, sizes: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    def masked() -> dict[str, Any]:
        return {"bias": _bias(draw, sizes), "hide": draw.one(*HIDDEN), "hidden": draw.one(*HIDING)}

    offsets = () if dtype is torch.float16 else (1e6,)
    return {
        "bias": lambda: {"bias": _bias(draw, sizes), "offset": draw.one(0.0, 0.0, 100.0, -1e4, *offsets)},
        "mask of numbers": masked,
        "mask of numbers in float32": lambda: masked() | {"bias_dtype": torch.float32},
        "mask": lambda: {"bias": _bias(draw, sizes), "hide": draw.one(*HIDDEN), "masks": True},
        "scale": lambda: {"scale": draw.one(1.0, 0.0, 1e-3, -0.5)},
        "expanded": lambda: {"layout": "expanded"},
    }


def _options(draw: Draw, pool: Mapping[str, Callable[[], dict[str, Any]]]) -> dict[str, Any]:
    """Options that go together: of large scores that have most of their size in common, float32 keeps no difference.

    Which key wins is then a matter of luck, torch's as much as ours.
    """
    flags = draw.options(pool)
    if flags.get("values") in _FAR_VALUES and not flags.get("softcap"):
        flags.pop("logits", None)
    return flags


def _judged(draw: Draw, case: AttentionCase, dtype: torch.dtype) -> Judged:
    return Judged(case=case, dtype=dtype, seed=draw.seed(), inference=draw.chance(0.25))


def _named(draw: Draw) -> dict[str, Any]:
    return {"name": f"number {draw.number}", "regime": ""}


def dense(draw: Draw) -> Judged:
    dtype, sizes = draw.one(*FLOATS), _sizes(draw)
    pool = _modifiers(draw, sizes, dtype) | _dense(draw, sizes, dtype)
    pool["dropout"] = lambda: {"dropout": draw.one(0.1, 0.5, 0.9)}
    return _judged(draw, AttentionCase(**_named(draw), **sizes | _options(draw, pool)), dtype)


def decoding(draw: Draw) -> Judged:
    """Few queries over many keys, which have their own kernels."""
    dtype = draw.one(*FLOATS)
    sizes = {"queries": draw.one(1, 1, 1, 2, 3, 5), "keys": draw.size(TILES, MANY, LONG, empty=0.0)}
    sizes |= {"heads": draw.one(1, 2, 4, 8), "batch": draw.one(1, 2), "dim": _dim(draw)}
    pool = _modifiers(draw, sizes, dtype) | _dense(draw, sizes, dtype)
    case = AttentionCase(**_named(draw), **sizes | _options(draw, pool))
    return Judged(case=case, dtype=dtype, seed=draw.seed(), inference=draw.chance(0.8))


def packed(draw: Draw) -> Judged:
    dtype = draw.one(*FLOATS)
    lengths = tuple(
        (draw.size(FEW, VECTORS, TILES, empty=0.1), draw.size(FEW, VECTORS, TILES, empty=0.1))
        for _ in range(draw.one(1, 2, 3, 4, 7))
    )
    queries, keys = (sum(pair[side] for pair in lengths) for side in (0, 1))
    sizes = {"queries": queries, "keys": keys, "heads": draw.one(1, 2, 4), "dim": _dim(draw)}
    pool = _modifiers(draw, sizes, dtype) | {"dropout": lambda: {"dropout": draw.one(0.1, 0.5)}}
    del pool["layout"]
    flags = sizes | _options(draw, pool) | {"slopes_by_batch": False}
    return _judged(draw, PackedAttentionCase(**_named(draw), lengths=lengths, **flags), dtype)


def paged(draw: Draw) -> Judged:
    dtype = draw.one(*FLOATS)
    lengths = tuple(draw.size(FEW, VECTORS, TILES, MANY, empty=0.05) for _ in range(draw.one(1, 1, 2, 3, 5)))
    sizes = {"queries": draw.one(1, 1, 1, 2, 4, 16, 21), "keys": max(lengths), "batch": len(lengths)}
    sizes |= {"heads": draw.one(1, 2, 4, 8), "dim": _dim(draw)}
    pool = _modifiers(draw, sizes, dtype)
    del pool["layout"]
    cache = {"block_size": draw.one(1, 7, 16, 64, 256), "spare": draw.one(0, 1, 5), "split_heads": draw.chance(0.3)}
    flags = sizes | _options(draw, pool) | cache | {"bottom_right": True}
    return _judged(draw, PagedAttentionCase(**_named(draw), lengths=lengths, **flags), dtype)


def sdpa(draw: Draw) -> Judged:
    dtype, sizes, dims = draw.one(*FLOATS), _sizes(draw), draw.one(4, 4, 4, 3, 2, 5)
    if dims < 4:
        sizes["batch"] = 1
    if dims < 3:
        sizes["heads"] = 1
    pool = {
        n: o
        for n, o in _modifiers(draw, sizes, dtype).items()
        if n not in ("causal at the end", "window", "softcap", "alibi", "sinks", "lse")
    }
    pool |= _dense(draw, sizes, dtype) | {"shared": lambda: {"shared": dims > 3}}
    fields = _options(draw, pool)
    if "bias" in fields:
        fields["causal"] = False
    return _judged(draw, SdpaCase(**_named(draw), dims=dims, **sizes | fields), dtype)
