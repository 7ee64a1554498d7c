"""Cases of rotary_embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchweld import ops, reference
from torchweld.reference.rotary_embedding import rotary_tables
from torchweld.testing.case import Case, Tensors
from torchweld.testing.inputs import Random


@dataclass(frozen=True, kw_only=True)
class RotaryCase(Case):
    """`kv_heads`: of the key, 0 for none. `positions`: rows of the tables, drawn by position_ids; 0: no position_ids.

    `columns`: what the tables have one for, a "pair" or an "element"; or "independent", an element whose angle is no
    other's. `made`: the tables are made from the positions.
    """

    batch: int
    heads: int
    kv_heads: int
    tokens: int
    dim: int
    rotary_dim: int | None = None
    interleaved: bool = False
    seq_dim: int = -2
    layout: str = "contiguous"
    positions: int = 0
    batched: bool = False
    columns: str = "element"
    made: bool = False
    table: torch.dtype | None = None  # None: the tensors' own
    scale: float = 1.0

    @property
    def op(self) -> str:
        return "rotary_embedding"

    @property
    def leaves(self) -> tuple[str, ...]:
        return ("query", "key") if self.kv_heads else ("query",)

    @property
    def size(self) -> int:
        return self.dim if self.rotary_dim is None else self.rotary_dim

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Tensors:
        random = Random(seed, device)

        def heads(count: int, layout: str = self.layout) -> Tensor:
            rows = (count, self.tokens) if self.seq_dim == -2 else (self.tokens, count)
            return random.normal(self.batch, *rows, self.dim, dtype=dtype, scale=self.scale, layout=layout)

        found = {"query": heads(self.heads)}
        if self.kv_heads:
            found["key"] = heads(self.kv_heads)
        found["dquery_output"] = heads(self.heads, "contiguous")
        if self.kv_heads:
            found["dkey_output"] = heads(self.kv_heads, "contiguous")
        rows = self.positions or self.tokens
        if self.positions:
            shape = (self.batch, self.tokens) if self.batched else (self.tokens,)
            found["position_ids"] = torch.randint(rows, shape, generator=random.generator, device=random.device)
        if not self.made:
            shape = (self.batch, rows) if self.batched and not self.positions else (rows,)
            cos, sin = rotary_tables(torch.arange(rows, device=random.device).expand(shape), self.size)
            if self.columns == "independent":
                angles = random.normal(*shape, self.size)
                cos, sin = angles.cos(), angles.sin()
            elif self.columns == "element":
                cos, sin = (
                    t.repeat_interleave(2, -1) if self.interleaved else torch.cat((t, t), -1) for t in (cos, sin)
                )
            found |= {"cos": cos.to(self.table or dtype), "sin": sin.to(self.table or dtype)}
        return found

    def _named(self, x: Tensors, turned: Tensor | tuple[Tensor, Tensor]) -> Tensors:
        if isinstance(turned, Tensor):
            return {"query_output": turned}
        return {"query_output": turned[0], "key_output": turned[1]}

    def _options(self) -> dict[str, object]:
        return {"interleaved": self.interleaved, "rotary_dim": self.rotary_dim, "seq_dim": self.seq_dim}

    def ours(self, x: Tensors) -> Tensors:
        tensors = (x.get(n) for n in ("query", "key", "cos", "sin"))
        return self._named(
            x,
            ops.rotary_embedding(*tensors, position_ids=x.get("position_ids"), **self._options()),  # type: ignore[arg-type]
        )

    def reference(self, x: Tensors) -> Tensors:
        tensors = (x.get(n) for n in ("query", "key", "cos", "sin"))
        return self._named(
            x,
            reference.rotary_embedding(*tensors, position_ids=x.get("position_ids"), **self._options()),  # type: ignore[arg-type]
        )

    def torch(self, x: Tensors) -> Tensors:
        """As models write it, the tables in the tensors' dtype."""
        size, ids = self.size, x.get("position_ids")
        if self.made:
            positions = torch.arange(self.tokens, device=x["query"].device) if ids is None else ids
            frequencies = 1 / 10000.0 ** (torch.arange(0, size, 2, device=x["query"].device).float() / size)
            angles = positions[..., None].float() * frequencies
            cos, sin = angles.cos(), angles.sin()
        else:
            cos, sin = (x[n] if ids is None else x[n][ids] for n in ("cos", "sin"))
        if cos.shape[-1] != size:
            cos, sin = (t.repeat_interleave(2, -1) if self.interleaved else torch.cat((t, t), -1) for t in (cos, sin))
        cos, sin = (t.unsqueeze(-3 if self.seq_dim == -2 else -2).to(x["query"].dtype) for t in (cos, sin))

        def turned(t: Tensor) -> Tensor:
            head, rest = t[..., :size], t[..., size:]
            if self.interleaved:
                crossed = torch.stack((-head[..., 1::2], head[..., ::2]), -1).flatten(-2)
            else:
                crossed = torch.cat((-head[..., size // 2 :], head[..., : size // 2]), -1)
            return torch.cat((head * cos + crossed * sin, rest), -1)

        if "key" not in x:
            return {"query_output": turned(x["query"])}
        return {"query_output": turned(x["query"]), "key_output": turned(x["key"])}


def _case(name: str, regime: str, *sizes: int, **flags: object) -> RotaryCase:
    names = ("batch", "heads", "kv_heads", "tokens", "dim")
    return RotaryCase(name=name, regime=regime, **dict(zip(names, sizes, strict=True)), **flags)  # type: ignore[arg-type]


ROTARY_EMBEDDING: tuple[Case, ...] = (
    _case("2 x 4 on 2 x 7 x 32", "whole vectors", 2, 4, 2, 7, 32),
    _case("query alone", "no key", 1, 3, 0, 5, 16),
    _case("one token", "decoding", 1, 4, 2, 1, 64, positions=100, columns="pair"),
    _case("heads of 40", "a tail in each half", 2, 3, 1, 9, 40, columns="pair"),
    _case("heads of 2", "one pair", 1, 2, 2, 5, 2),
    _case("no tokens", "nothing", 1, 2, 2, 0, 8),
    _case("interleaved", "neighbours are a pair", 2, 4, 2, 7, 32, interleaved=True),
    _case("interleaved by pair", "a column for each pair, a tail", 1, 3, 2, 9, 44, interleaved=True, columns="pair"),
    _case("partial", "what is left of a head is copied", 2, 4, 2, 7, 64, rotary_dim=20),
    _case("interleaved partial", "the same of neighbours", 2, 4, 2, 7, 50, rotary_dim=36, interleaved=True),
    _case("tokens first", "(B, N, H, D)", 2, 4, 2, 40, 32, seq_dim=-3),
    _case("transposed", "(B, N, H, D) seen as (B, H, N, D)", 2, 4, 2, 40, 32, layout="transposed", seq_dim=-3),
    _case("strided", "no neighbours, NaN between the elements", 1, 3, 3, 9, 24, layout="strided"),
    _case("unaligned", "no vector at an aligned address", 1, 3, 3, 9, 48, layout="unaligned"),
    _case("positions", "rows of the tables by number", 2, 4, 2, 33, 32, positions=500),
    _case("positions by batch", "other rows for each batch", 3, 2, 1, 9, 32, positions=70, batched=True),
    _case("tables by batch", "(B, N, C)", 3, 2, 1, 9, 32, batched=True),
    _case("independent", "no two elements have an angle in common", 2, 2, 1, 9, 48, columns="independent"),
    _case("independent neighbours", "nor two neighbours", 2, 2, 1, 9, 48, columns="independent", interleaved=True),
    _case("float32 tables", "exact angles", 2, 4, 2, 33, 64, table=torch.float32, columns="pair"),
    _case("made", "tables from positions", 2, 2, 1, 33, 32, made=True),
    _case("made far out", "positions up to 100000", 1, 2, 1, 33, 32, made=True, positions=100000, batched=True),
    _case("of 1e4", "large", 1, 2, 1, 33, 32, scale=1e4),
    _case("1 x 32 on 8 x 300 x 128", "past the caches", 1, 64, 8, 300, 128),
)
