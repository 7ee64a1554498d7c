"""Cases of attention: sizes about the kernels' tiles, and every modifier of the scores."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.utils.checkpoint
from torch import Tensor

from torchweld import ops, reference
from torchweld.testing.cases import Case, Tensors
from torchweld.testing.inputs import Random

_BY_HEAD = 1 << 25  # scores above which the definition is asked head by head: all of them would not fit into memory


@dataclass(frozen=True, kw_only=True)
class AttentionCase(Case):
    """`bias`: its shape, which broadcasts to (B, H, Nq, Nk); boolean with `masks`, which leaves row 0 without a key.

    `logits`: about how large the scores get. `merged`: heads lie beside each other in memory, (B, N, H, D), as a
    projection leaves them. `unseen_nan`: the values of keys that no query sees are NaN.
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

    @property
    def op(self) -> str:
        return "attention"

    @property
    def leaves(self) -> tuple[str, ...]:
        return ("query", "key", "value", "sinks") + (() if self.masks else ("bias",))

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
            "causal_align": "bottom_right" if self.bottom_right else "top_left",
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
        return not (self.bias or self.alibi or self.sinks or self.lse)

    def mask(self, x: Tensors) -> Tensor:
        """Band, bias and ALiBi as one additive mask in the dtype of the query: what torch has to be given."""
        device, dtype = x["query"].device, x["query"].dtype
        shift = self.keys - self.queries if self.bottom_right else 0
        away = torch.arange(self.keys, device=device) - torch.arange(self.queries, device=device).unsqueeze(1) - shift
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
        if self.softcap == 0 and not (self.sinks or self.lse or self.unseen_nan or self.masks):
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

    def _composed(self, x: Tensors) -> Tensors:
        """What torch's own function does not take."""
        weights, lse = self._weights(x)
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
        weights = self._weights(x)[0]
        scale = 1.0 / math.sqrt(self.dim)
        p = weights * (q @ k.mT) * scale
        ds = weights * (do @ v.mT + (do * (weights @ v)).sum(-1, keepdim=True))
        group = 1 if self.kv_heads is None else self.heads // self.kv_heads
        sizes = {
            "output": p @ v,
            "lse": p.sum(-1),
            "dquery": ds @ k * scale,
            "dkey": (ds.mT @ q * scale).unflatten(1, (-1, group)).sum(2),
            "dvalue": (p.mT @ do).unflatten(1, (-1, group)).sum(2),
            "dbias": ds,
        }
        return {n: float(t.amax()) for n, t in sizes.items()}


def _case(name: str, regime: str, queries: int, keys: int, **flags: object) -> Case:
    return AttentionCase(name=name, regime=regime, queries=queries, keys=keys, **flags)  # type: ignore[arg-type]


ATTENTION = (
    _case("64 x 64", "one tile", 64, 64),
    _case("1 x 1", "one key: dquery and dkey are 0, all of them cancels", 1, 1, dim=8),
    _case("0 x 5", "no queries", 0, 5),
    _case("1 x 300", "decoding: one query, many keys", 1, 300, heads=4, kv_heads=1),
    _case("5 x 3", "far less than a tile", 5, 3),
    _case("67 x 131", "prime: ragged tiles on both sides", 67, 131),
    _case("200 x 200 causal", "tiles above, on and below the diagonal", 200, 200, causal=True),
    _case("257 x 257 causal", "batches and heads, a tile of one row", 257, 257, batch=2, heads=4, causal=True),
    _case("40 x 100 causal", "aligned to the first key: most keys unseen", 40, 100, causal=True, unseen_nan=True),
    _case("40 x 100 causal, cache", "aligned to the last key", 40, 100, causal=True, bottom_right=True),
    _case("100 x 40 causal, cache", "rows that see nothing", 100, 40, causal=True, bottom_right=True, lse=True),
    _case("33 x 70, D 128", "a wide head", 33, 70, dim=128),
    _case("33 x 70, D 80", "a head that is no power of two", 33, 70, dim=80),
    _case("33 x 70, D 7", "a head that is no whole vector", 33, 70, dim=7),
    _case("33 x 70, D 256", "the widest head", 33, 70, dim=256),
    _case("33 x 70, Dv 40", "values narrower than the keys", 33, 70, value_dim=40),
    _case("GQA 8:2", "query heads share key heads", 50, 90, heads=8, kv_heads=2, causal=True),
    _case("merged heads", "non-contiguous: (B, N, H, D) in memory", 70, 70, batch=2, merged=True, causal=True),
    _case("window (16, 0)", "tiles left of the window are skipped", 150, 150, causal=True, window=(16, None)),
    _case("window (9, 5)", "a band, not causal", 90, 90, window=(9, 5)),
    _case("softcap 5", "scores bounded", 60, 60, softcap=5.0, logits=20.0),
    _case("ALiBi", "bias by distance", 90, 90, heads=4, causal=True, alibi=True),
    _case("sinks", "one more term in the denominator", 60, 60, sinks=True, causal=True),
    _case("bias", "additive, with a gradient of full size", 40, 70, bias=(1, 2, 40, 70)),
    _case("bias by key", "additive, broadcast: its gradient is a sum", 40, 70, batch=2, bias=(2, 1, 1, 70)),
    _case("mask", "boolean, a row without a key", 40, 70, bias=(1, 1, 40, 70), masks=True),
    _case("lse", "the denominator's logarithm and its gradient", 60, 60, lse=True),
    _case("logits of 1e4", "softmax picks one key", 60, 60, logits=1e4),
)
