"""Along what each function of torchweld.ops may be cut: one rule for each, and the calls that need more than a rule."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from torchweld import ops
from torchweld.distributed import losses
from torchweld.distributed.layouts import Labels, Layout, Rule, run
from torchweld.reference.philox import draw_seed

Arguments = Mapping[str, Any]


def _leading(count: int, dims: int) -> Labels:
    """Labels of all dimensions but the last `count`."""
    return (*(f"dimension {d}" for d in range(dims - count)), *(None,) * count)


def _aligned(names: Labels, dims: int) -> Labels:
    """The last `dims` of the labels: of a tensor that broadcasts."""
    return names[len(names) - dims :] if dims else ()


# ---- The rules. Each is a function of the arguments, as far as they are given.


def _norm(given: Arguments) -> Rule:
    width = len(given["normalized_shape"])
    first = "x" if "x" in given else "input"
    rows = _leading(width, given[first].dim())
    parameter = (None,) * width
    inputs = {first: rows, "residual": rows, "weight": parameter, "bias": parameter, "seed": (None,)}
    return Rule(inputs, (rows, rows))


def _dropped(given: Arguments) -> Rule:
    every = _leading(0, given["input"].dim())
    return Rule({"input": every, "seed": (None,)}, (every,))


def _gelu(given: Arguments) -> Rule:
    every = _leading(0, given["input"].dim())
    return Rule({"input": every}, (every,))


def _gated(given: Arguments) -> Rule:
    packed = given.get("up") is None  # the halves of the last dimension belong together
    labels = _leading(packed, given["gate"].dim())
    return Rule({"gate": labels, "up": labels}, (labels,))


def _rotary(given: Arguments) -> Rule:
    made = given.get("cos") is None and given.get("position_ids") is None  # by the place of a token
    tokens = None if made else "tokens"
    labels: Labels = ("batch", "heads", tokens, None)
    if given.get("seq_dim", -2) in (-3, 1):
        labels = ("batch", tokens, "heads", None)
    by_token: Labels = (tokens, None) if given.get("position_ids") is None else (None, None)
    positions: Labels = ("batch", "tokens")
    table = {name: _table(given.get(name), by_token) for name in ("cos", "sin")}
    ids = given.get("position_ids")
    inputs = {
        "query": labels,
        "key": labels,
        **table,
        "position_ids": positions[2 - (0 if ids is None else ids.dim()) :],
    }
    return Rule(inputs, (labels, labels), like=("query", "key"))


def _table(t: Tensor | None, labels: Labels) -> Labels:
    return labels if t is None or t.dim() == 2 else ("batch", *labels)


def _attention(given: Arguments) -> Rule:
    packed = given.get("cu_seqlens_q") is not None or given.get("cu_seqlens_k") is not None
    places = given.get("causal") or given.get("window") is not None or given.get("alibi_slopes") is not None
    rows = None if places or packed else "queries"
    heads: Labels = (None, "heads", None) if packed else ("batch", "heads", None, None)
    query: Labels = heads if packed else ("batch", "heads", rows, None)
    bias, slopes = given.get("bias"), given.get("alibi_slopes")
    by_head: Labels = (None if packed else "batch", "heads")
    inputs: dict[str, Labels] = {
        "query": query,
        "key": heads,
        "value": heads,
        "bias": _aligned(("batch", "heads", rows, None), 0 if bias is None else bias.dim()),
        "alibi_slopes": _aligned(by_head, 0 if slopes is None else slopes.dim()),
        "sinks": ("heads",),
        "seed": (None,),
        "cu_seqlens_q": (None,),
        "cu_seqlens_k": (None,),
    }
    return Rule(inputs, (query, ("heads", None) if packed else query[:3]))


def _sdpa(given: Arguments) -> Rule:
    """Of any number of batch dimensions, the last of which counts the heads."""
    query, mask = given["query"], given.get("attn_mask")
    most = max(t.dim() for t in (query, given["key"], given["value"]))
    most = most if mask is None else max(most, mask.dim())
    rows = None if given.get("is_causal") else "queries"
    lead = _leading(0, most - 2)
    keys: Labels = (*lead, None, None)
    inputs = {
        "query": _aligned((*lead, rows, None), query.dim()),
        "key": _aligned(keys, given["key"].dim()),
        "value": _aligned(keys, given["value"].dim()),
        "attn_mask": _aligned((*lead, rows, None), 0 if mask is None else mask.dim()),
    }
    return Rule(inputs, (_aligned((*lead, rows, None), max(query.dim(), given["key"].dim(), given["value"].dim())),))


def _paged(given: Arguments) -> Rule:
    query: Labels = ("batch", "heads", None, None)
    slopes = given.get("alibi_slopes")
    inputs: dict[str, Labels] = {
        "query": query,
        "key_cache": (None, None, "heads", None),  # blocks, rows of a block
        "value_cache": (None, None, "heads", None),
        "block_table": ("batch", None),
        "cache_seqlens": ("batch",),
        "alibi_slopes": _aligned(("batch", "heads"), 0 if slopes is None else slopes.dim()),
        "sinks": ("heads",),
    }
    return Rule(inputs, (query, query[:3]))


RULES: dict[str, Callable[[Arguments], Rule]] = {
    "layer_norm": _norm,
    "rms_norm": _norm,
    "add_layer_norm": _norm,
    "add_rms_norm": _norm,
    "dropout": _dropped,
    "gelu": _gelu,
    "swiglu": _gated,
    "geglu": _gated,
    "rotary_embedding": _rotary,
    "attention": _attention,
    "scaled_dot_product_attention": _sdpa,
    "paged_attention": _paged,
}


# ---- Calls


def _other_bits(layout: Layout, parts: dict[str, Any]) -> None:
    """The part's own seed: parts have other masks, copies of a part have the same."""
    if layout.is_cut:
        step = layout.part() * 0x5851F42D4C957F2D
        parts["seed"] = parts["seed"] + ((step + (1 << 63)) % (1 << 64) - (1 << 63))  # in 64 bits, with a sign


def _call(function: Callable[..., Any], given: dict[str, Any], names: tuple[str, ...]) -> Any:
    """A function with a rule."""
    op, seeded = function.__name__, None
    if given.get("p" if op == "dropout" else "dropout_p", 0.0) > 0:
        seeded = _other_bits
        if given.get("seed") is None:
            given["seed"] = draw_seed(given[names[0]].device)
    tensors = {name: given.pop(name, None) for name in names}
    rule = RULES[op]({**given, **{name: t for name, t in tensors.items() if t is not None}})
    return run(op, partial(function, **given), tensors, rule, seeded)


def attention_on_parts(function: Callable[..., Any], given: dict[str, Any]) -> Any:
    """A function that takes what `attention` takes, of a sequence that is not to be cut: by batch and heads alone."""
    names = tuple(name for name in _TENSORS["attention"] if not name.startswith("cu_"))
    tensors = {name: given.pop(name, None) for name in names}
    if given.pop("cu_seqlens", None) is not None:
        raise RuntimeError(
            "[attention] cu_seqlens_q: expected None beside DTensors in context_parallel, but got a tensor; use "
            "to_local()"
        )
    if given.get("dropout_p", 0.0) > 0 and tensors["seed"] is None:
        raise RuntimeError(
            "[attention] seed: expected a tensor, the same in all processes, beside DTensors in context_parallel, but "
            "got None; use torchweld.ops.attention"
        )
    seeded = _other_bits if given.get("dropout_p", 0.0) > 0 else None
    rule = _attention({**{n: t for n, t in tensors.items() if t is not None}, "causal": True})
    return run("attention", partial(function, **given), tensors, rule, seeded)


def _scaled_dot_product_attention(function: Callable[..., Any], given: dict[str, Any], names: tuple[str, ...]) -> Any:
    """With dropout the masks of the parts need a seed, which `attention` takes."""
    if given.get("dropout_p", 0.0) == 0:
        return _call(function, given, names)
    query, key, value, mask = (given.get(name) for name in names)
    assert query is not None and key is not None and value is not None
    if not query.dim() == key.dim() == value.dim() == 4:
        raise RuntimeError(
            f"[scaled_dot_product_attention] query, key, value: expected DTensors [batch, heads, rows, head size] "
            f"beside dropout_p, but got shapes {[list(t.shape) for t in (query, key, value)]}; fold the batch"
        )
    rich = {"causal": given.get("is_causal", False), "bias": mask, "dropout_p": given["dropout_p"]}
    tensors = {"query": query, "key": key, "value": value, "scale": given.get("scale")}
    return call(ops.attention, **tensors, **rich)


def _dropout(function: Callable[..., Any], given: dict[str, Any], names: tuple[str, ...]) -> Any:
    """Where nothing is dropped, input itself."""
    p = given.setdefault("p", 0.5)
    return _call(function, given, names) if given.pop("training", True) and p > 0 else given["input"]


def _rotary_embedding(function: Callable[..., Any], given: dict[str, Any], names: tuple[str, ...]) -> Any:
    """In place, the results are copied."""
    inplace = given.pop("inplace", False)
    targets = [t for t in (given["query"], given.get("key")) if t is not None]
    found = _call(function, given, names)
    if inplace:
        for target, turned in zip(targets, found if isinstance(found, tuple) else (found,), strict=True):
            target.copy_(turned)
        return targets[0] if len(targets) == 1 else tuple(targets)
    return found


_CALLS: dict[str, Callable[..., Any]] = {
    "dropout": _dropout,
    "scaled_dot_product_attention": _scaled_dot_product_attention,
    "rotary_embedding": _rotary_embedding,
    "cross_entropy": losses.cross_entropy,
    "linear_cross_entropy": losses.linear_cross_entropy,
}
_TENSORS = {
    "layer_norm": ("input", "weight", "bias"),
    "rms_norm": ("input", "weight"),
    "add_layer_norm": ("x", "residual", "weight", "bias", "seed"),
    "add_rms_norm": ("x", "residual", "weight", "seed"),
    "dropout": ("input", "seed"),
    "gelu": ("input",),
    "swiglu": ("gate", "up"),
    "geglu": ("gate", "up"),
    "rotary_embedding": ("query", "key", "cos", "sin", "position_ids"),
    "attention": (
        "query", "key", "value", "bias", "alibi_slopes", "sinks", "seed", "cu_seqlens_q", "cu_seqlens_k",
    ),
    "scaled_dot_product_attention": ("query", "key", "value", "attn_mask"),
    "paged_attention": (
        "query", "key_cache", "value_cache", "block_table", "cache_seqlens", "alibi_slopes", "sinks",
    ),
    "cross_entropy": ("input", "target", "weight"),
    "linear_cross_entropy": ("input", "weight", "target", "bias"),
}  # fmt: skip
_PARAMETERS = {name: tuple(inspect.signature(getattr(ops, name)).parameters) for name in _TENSORS}


def call(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """`function`, one of torchweld.ops, of arguments with a DTensor among them."""
    op = function.__name__
    given = {**dict(zip(_PARAMETERS[op], args, strict=False)), **options}
    return _CALLS.get(op, _call)(function, given, _TENSORS[op])
