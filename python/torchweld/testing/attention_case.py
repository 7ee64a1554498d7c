"""A case of attention: the sizes, every modifier of the scores, and torch's arguments for the same result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.utils.checkpoint
from torch import Tensor

from torchweld import ops, reference
from torchweld.reference.philox import dropout_factors
from torchweld.testing import attention_rounding
from torchweld.testing.case import Case, Tensors
from torchweld.testing.inputs import Random, hidden, place, shape_values

_BY_HEAD = 1 << 25  # scores above which the definition runs head by head, to fit into memory


@dataclass(frozen=True, kw_only=True)
class AttentionCase(Case):
    """`bias`: its shape, which broadcasts to (B, H, Nq, Nk); boolean with `masks`, which leaves row 0 without a key.

    `hide`: which keys a bias hides (see `inputs.HIDDEN`), an additive one by the number `hidden`; what it does not hide
    carries normal numbers about `offset`. `logits`: about how large the scores get. `values`: see `inputs.VALUES`.
    `layout`: see `inputs.place`, or "expanded" over the batch. `merged`: heads lie beside each other in memory,
    (B, N, H, D), as a projection leaves them. `unseen_nan`: the values of keys that no query sees are NaN. `dropout`:
    its probability. `slopes_by_batch`: ALiBi's slopes are (B, H).
    """

    batch: int = 1
    heads: int = 2
    queries: int
    keys: int
    dim: int = 64
    kv_heads: int | None = None
    value_dim: int | None = None
    causal: bool = False
    bottom_right: bool = False
    window: tuple[int | None, int | None] | None = None
    softcap: float = 0.0
    bias: tuple[int, ...] | None = None
    masks: bool = False
    hide: str = ""
    hidden: float = -math.inf
    offset: float = 0.0
    bias_dtype: torch.dtype | None = None
    alibi: bool = False
    slopes_by_batch: bool = False
    sinks: bool = False
    lse: bool = False
    logits: float = 1.0
    values: str = "normal"
    scale: float | None = None
    layout: str = "contiguous"
    merged: bool = False
    unseen_nan: bool = False
    dropout: float = 0.0
    deterministic: bool = True

    @property
    def op(self) -> str:
        return "attention"

    @property
    def leaves(self) -> tuple[str, ...]:
        return ("query", "key", "value", "alibi_slopes", "sinks") + (() if self.masks else ("bias",))

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Tensors:
        random = Random(seed, device)

        def heads(count: int, rows: int, size: int, scale: float = 1.0) -> Tensor:
            if self.merged:
                return random.normal(self.batch, rows, count, size, dtype=dtype, scale=scale).transpose(1, 2)
            batch, layout = (1, "contiguous") if self.layout == "expanded" else (self.batch, self.layout)
            made = shape_values(random.normal(batch, count, rows, size, dtype=dtype, scale=scale), self.values)
            return place(made, layout).expand(self.batch, -1, -1, -1)

        kv_heads, value_dim, scale = self.kv_heads or self.heads, self.value_dim or self.dim, math.sqrt(self.logits)
        x = {
            "query": heads(self.heads, self.queries, self.dim, scale),
            "key": heads(kv_heads, self.keys, self.dim, scale),
            "value": heads(kv_heads, self.keys, value_dim),
            "doutput": heads(self.heads, self.queries, value_dim),
        }
        if self.unseen_nan:
            x["value"][:, :, self.queries :] = torch.nan
        if self.lse:
            x["dlse"] = random.normal(self.batch, self.heads, self.queries)
        if self.bias is not None and self.masks:
            x["bias"] = random.chance(*self.bias, probability=0.7)
            x["bias"][..., :1, :] = False
            if self.hide:
                x["bias"] = ~hidden(self.bias, self.hide, random)
        elif self.bias is not None:
            bias = random.normal(*self.bias, shift=self.offset)
            if self.hide:
                bias.masked_fill_(hidden(self.bias, self.hide, random), self.hidden)
            x["bias"] = place(bias.to(self.bias_dtype or dtype), "contiguous")
        if self.alibi:
            slopes = 0.5 ** torch.arange(1, self.heads + 1, device=device, dtype=torch.float32)
            batches = torch.arange(1, self.batch + 1, device=device).unsqueeze(1)
            x["alibi_slopes"] = slopes * batches if self.slopes_by_batch else slopes
        if self.sinks:
            x["sinks"] = random.normal(self.heads)
        if self.dropout:
            x["seed"] = torch.tensor([seed - (1 << 40)], device=device)
            shape = (self.batch, self.heads, self.queries, self.keys)
            # Made beforehand, for torch's own dropout costs less than this definition.
            x["kept"] = dropout_factors(x["seed"], math.prod(shape[:3]), self.keys, self.dropout).view(shape).float()
        return x

    def _named(self, outputs: Tensor | tuple[Tensor, Tensor]) -> Tensors:
        return {"output": outputs} if isinstance(outputs, Tensor) else {"output": outputs[0], "lse": outputs[1]}

    def _modifiers(self, x: Tensors) -> dict[str, object]:
        return {
            "causal": self.causal,
            "window": self.window,
            "softcap": self.softcap,
            "bias": x.get("bias"),
            "alibi_slopes": x.get("alibi_slopes"),
            "sinks": x.get("sinks"),
            "dropout_p": self.dropout,
            "seed": x.get("seed"),
            "scale": self.scale,
            "causal_align": "bottom_right" if self.bottom_right else "top_left",
            "deterministic": self.deterministic,
            "return_lse": self.lse,
        }

    def ours(self, x: Tensors) -> Tensors:
        return self._named(ops.attention(x["query"], x["key"], x["value"], **self._modifiers(x)))  # type: ignore[arg-type]

    def reference(self, x: Tensors) -> Tensors:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = reference.attention(q, k, v, **self._modifiers(x))  # type: ignore[arg-type]
            assert isinstance(out, Tensor)
            return out

        if self.batch * self.heads * self.queries * self.keys <= _BY_HEAD or not self._plain:
            return self._named(reference.attention(x["query"], x["key"], x["value"], **self._modifiers(x)))  # type: ignore[arg-type]
        group = self.heads // (self.kv_heads or self.heads)
        outs = [
            torch.utils.checkpoint.checkpoint(
                call,
                x["query"][b : b + 1, h : h + 1],
                *(x[n][b : b + 1, h // group : h // group + 1] for n in ("key", "value")),
                use_reentrant=False,
            )
            for b in range(self.batch)
            for h in range(self.heads)
        ]
        return {"output": torch.cat(outs).view(self.batch, self.heads, self.queries, -1)}

    @property
    def _plain(self) -> bool:
        return not (self.bias or self.alibi or self.sinks or self.lse or self.dropout)

    def _away(self, x: Tensors) -> Tensor:
        """(Nq, Nk): the position of each key relative to that of the query."""
        keys, queries = (torch.arange(n, device=x["query"].device) for n in (self.keys, self.queries))
        return keys - queries.unsqueeze(1) - (self.keys - self.queries if self.bottom_right else 0)

    def mask(self, x: Tensors) -> Tensor:
        """torch's argument: band, bias and ALiBi as one additive mask, in the dtype of the query or of a wider bias."""
        dtype, away = x["query"].dtype, self._away(x)
        if self.bias is not None and not self.masks:
            dtype = torch.promote_types(dtype, x["bias"].dtype)
        left, right = self.window or (None, None)
        right = 0 if self.causal else right
        seen = torch.ones_like(away, dtype=torch.bool)
        seen = seen if left is None else seen & (away >= -left)
        seen = seen if right is None else seen & (away <= right)
        mask = torch.zeros_like(away, dtype=dtype)
        if self.alibi:
            mask = mask - (x["alibi_slopes"].unsqueeze(-1).unsqueeze(-1) * away.abs()).to(dtype)
        if self.bias is not None and self.masks:
            seen = seen & x["bias"]
        elif self.bias is not None:
            mask = mask + x["bias"]
        return mask.masked_fill(~seen, -math.inf)

    def torch(self, x: Tensors) -> Tensors:
        composed = self.sinks or self.lse or self.unseen_nan or self.masks or self.dropout or self._wide(x)
        composed = composed or self.scale == 0  # torch's kernel multiplies the mask's -inf by it: NaN
        if self.softcap == 0 and not composed:
            banded = self.causal and not self.bottom_right and self.window is None and self.bias is None
            plain = not (self.causal or self.window or self.bias or self.alibi)
            out = torch.nn.functional.scaled_dot_product_attention(
                x["query"],
                x["key"],
                x["value"],
                None if plain or (banded and not self.alibi) else self.mask(x),
                is_causal=banded and not self.alibi,
                scale=self.scale,
                enable_gqa=self.kv_heads is not None,
            )
            return {"output": out}
        return self._composed(x)

    @property
    def _scale(self) -> float:
        return 1.0 / math.sqrt(max(self.dim, 1)) if self.scale is None else self.scale

    def _wide(self, x: Tensors) -> bool:
        """Whether a bias wider than the query has a gradient. torch's own function then computes in float32."""
        bias = x.get("bias")
        return bias is not None and bias.requires_grad and bias.dtype != x["query"].dtype

    def _weights(self, x: Tensors) -> tuple[Tensor, Tensor]:
        """Softmax weights (B, H, Nq, Nk) and lse, written out in the dtype of the inputs."""
        q, k = x["query"], self._by_query_head(x["key"])
        scores = q @ k.mT * self._scale
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        mask = self.mask(x)
        blind = mask.isneginf().all(-1, keepdim=True)
        scores = scores + mask
        if not self.sinks:
            scores = scores.masked_fill(blind, 0.0)
        else:
            column = x["sinks"].to(q.dtype).view(-1, 1, 1).expand(self.batch, -1, self.queries, 1)
            scores = torch.cat([scores, column], -1)
        lse = torch.logsumexp(scores.to(torch.promote_types(q.dtype, torch.float32)), -1)
        weights = torch.softmax(scores, -1)[..., : self.keys].masked_fill(blind, 0.0)
        return weights, lse if self.sinks else lse.masked_fill(blind.squeeze(-1), -math.inf)

    def _kept(self, x: Tensors) -> Tensor:
        """The factors of dropout: (B, H, Nq, Nk), or a single 1."""
        return x["kept"] if self.dropout else torch.ones((), device=x["query"].device)

    def _composed(self, x: Tensors) -> Tensors:
        """Attention of torch's operators, for arguments that torch's own function does not take."""
        weights, lse = self._weights(x)
        weights = weights.to(x["value"].dtype) * self._kept(x).to(x["value"].dtype)
        value = self._by_query_head(x["value"])
        if self.unseen_nan:
            value = value.masked_fill(torch.arange(self.keys, device=value.device).unsqueeze(1) >= self.queries, 0.0)
        return {"output": weights @ value} | ({"lse": lse} if self.lse else {})

    def _by_query_head(self, t: Tensor) -> Tensor:
        return t if self.kv_heads is None else t.repeat_interleave(self.heads // self.kv_heads, 1)

    def terms(self, x: Tensors) -> Mapping[str, Tensor | float]:
        if self.batch * self.heads * self.queries * self.keys > _BY_HEAD:
            return {}
        key, value = (self._by_query_head(x[n]).nan_to_num(0.0) for n in ("key", "value"))
        weights = self._weights(x)[0]
        return attention_rounding.sizes(
            x, key, value, weights, self._kept(x), self._scale, self.softcap, self._away(x), self.heads // key_heads(x)
        )

    def zeros(self, x: Tensors) -> Tensors:
        if self.batch * self.heads * self.queries * self.keys > _BY_HEAD:
            return {}
        shape = (self.batch, self.heads, self.queries, self.keys)
        # In float64 a finite bias stays finite after every addition.
        wide = {n: t.double() if t.is_floating_point() else t for n, t in x.items()}
        seen = ~self.mask(wide).isneginf().expand(shape)
        return attention_rounding.zeros(x, seen, self._kept(x), self.sinks or self.lse, self.heads // key_heads(x))


def key_heads(x: Tensors) -> int:
    return max(x["key"].shape[1], 1)
