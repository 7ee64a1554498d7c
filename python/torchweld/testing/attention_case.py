"""A case of attention: the sizes, every modifier of the scores, and what torch has to be given for the same."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.utils.checkpoint
from torch import Tensor

from torchweld import ops, reference
from torchweld.reference.philox import dropout_factors
from torchweld.testing.cases import Case, Tensors
from torchweld.testing.inputs import Random

_BY_HEAD = 1 << 25  # scores above which the definition is asked head by head: all of them would not fit into memory


@dataclass(frozen=True, kw_only=True)
class AttentionCase(Case):
    """`bias`: its shape, which broadcasts to (B, H, Nq, Nk); boolean with `masks`, which leaves row 0 without a key.

    `logits`: about how large the scores get. `merged`: heads lie beside each other in memory, (B, N, H, D), as a
    projection leaves them. `unseen_nan`: the values of keys that no query sees are NaN. `dropout`: its probability.
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
    alibi: bool = False
    sinks: bool = False
    lse: bool = False
    logits: float = 1.0
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
            return random.normal(self.batch, count, rows, size, dtype=dtype, scale=scale)

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
            x["bias"][..., 0, :] = False
        elif self.bias is not None:
            x["bias"] = random.normal(*self.bias, dtype=dtype)
        if self.alibi:
            x["alibi_slopes"] = 0.5 ** torch.arange(1, self.heads + 1, device=device, dtype=torch.float32)
        if self.sinks:
            x["sinks"] = random.normal(self.heads)
        if self.dropout:
            x["seed"] = torch.tensor([seed - (1 << 40)], device=device)
            shape = (self.batch, self.heads, self.queries, self.keys)
            # Made beforehand: what torch offers in its place costs less than this definition.
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
        """(Nq, Nk): how far each key is to the right of where the query stands."""
        keys, queries = (torch.arange(n, device=x["query"].device) for n in (self.keys, self.queries))
        return keys - queries.unsqueeze(1) - (self.keys - self.queries if self.bottom_right else 0)

    def mask(self, x: Tensors) -> Tensor:
        """Band, bias and ALiBi as one additive mask in the dtype of the query: what torch has to be given."""
        dtype, away = x["query"].dtype, self._away(x)
        left, right = self.window or (None, None)
        right = 0 if self.causal else right
        seen = torch.ones_like(away, dtype=torch.bool)
        seen = seen if left is None else seen & (away >= -left)
        seen = seen if right is None else seen & (away <= right)
        mask = torch.zeros_like(away, dtype=dtype)
        if self.alibi:
            mask = mask - (x["alibi_slopes"].view(-1, 1, 1) * away.abs()).to(dtype)
        if self.bias is not None and self.masks:
            seen = seen & x["bias"]
        elif self.bias is not None:
            mask = mask + x["bias"]
        return mask.masked_fill(~seen, -math.inf)

    def torch(self, x: Tensors) -> Tensors:
        if self.softcap == 0 and not (self.sinks or self.lse or self.unseen_nan or self.masks or self.dropout):
            banded = self.causal and not self.bottom_right and self.window is None and self.bias is None
            plain = not (self.causal or self.window or self.bias or self.alibi)
            out = torch.nn.functional.scaled_dot_product_attention(
                x["query"],
                x["key"],
                x["value"],
                None if plain or (banded and not self.alibi) else self.mask(x),
                is_causal=banded and not self.alibi,
                enable_gqa=self.kv_heads is not None,
            )
            return {"output": out}
        return self._composed(x)

    def _weights(self, x: Tensors) -> tuple[Tensor, Tensor]:
        """Softmax weights (B, H, Nq, Nk) and lse, written out in the dtype of the inputs."""
        q, k = x["query"], self._by_query_head(x["key"])
        scores = q @ k.mT / math.sqrt(self.dim)
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        mask = self.mask(x)
        blind = mask.isneginf().all(-1, keepdim=True)
        scores = (scores + mask).masked_fill(blind, 0.0)
        if self.sinks:
            column = x["sinks"].to(q.dtype).view(-1, 1, 1).expand(self.batch, -1, self.queries, 1)
            scores = torch.cat([scores, column], -1)
        lse = torch.logsumexp(scores.to(torch.promote_types(q.dtype, torch.float32)), -1)
        weights = torch.softmax(scores, -1)[..., : self.keys].masked_fill(blind, 0.0)
        return weights, lse.masked_fill(blind.squeeze(-1), -math.inf)

    def _kept(self, x: Tensors) -> Tensor:
        """What dropout multiplies the weights by: (B, H, Nq, Nk), or a single 1."""
        return x["kept"] if self.dropout else torch.ones((), device=x["query"].device)

    def _composed(self, x: Tensors) -> Tensors:
        """What torch's own function does not take."""
        weights, lse = self._weights(x)
        weights = weights * self._kept(x).to(weights.dtype)
        value = self._by_query_head(x["value"])
        if self.unseen_nan:
            value = value.masked_fill(torch.arange(self.keys, device=value.device).unsqueeze(1) >= self.queries, 0.0)
        return {"output": weights @ value} | ({"lse": lse} if self.lse else {})

    def _by_query_head(self, t: Tensor) -> Tensor:
        return t if self.kv_heads is None else t.repeat_interleave(self.heads // self.kv_heads, 1)

    def terms(self, x: Tensors) -> dict[str, float]:
        """Sizes to first order, with P the weights, of what rounding acts on before it cancels.

        An ulp of a score is one of sum|q||k|, and comes out as a relative error of P; dS = P * (dP - delta) is a
        difference of two sums over |dO||v|, exactly 0 where there is one key.
        """
        if self.queries == 0 or self.batch * self.heads * self.queries * self.keys > _BY_HEAD:
            return {}
        q, do = x["query"].abs(), x["doutput"].abs()
        k, v = (self._by_query_head(x[n]).nan_to_num(0.0).abs() for n in ("key", "value"))
        weights, kept = self._weights(x)[0], self._kept(x)
        scale = 1.0 / math.sqrt(self.dim)
        p = weights * (q @ k.mT) * scale
        ds = weights * (kept * (do @ v.mT) + (do * ((kept * weights) @ v)).sum(-1, keepdim=True))
        group = 1 if self.kv_heads is None else self.heads // self.kv_heads
        sizes = {
            "output": (kept * p) @ v,
            "lse": p.sum(-1),
            "dquery": ds @ k * scale,
            "dkey": (ds.mT @ q * scale).unflatten(1, (-1, group)).sum(2),
            "dvalue": ((kept * p).mT @ do).unflatten(1, (-1, group)).sum(2),
            "dbias": ds,
            "dalibi_slopes": (ds * self._away(x).abs()).sum((0, 2, 3)),
        }
        return {n: float(t.amax()) for n, t in sizes.items() if t.numel()}
