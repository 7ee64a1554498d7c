"""Cases of attention over a cache in blocks: each batch is a case of attention of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from torchweld import ops, reference
from torchweld.testing.attention_case import AttentionCase
from torchweld.testing.case import Tensors
from torchweld.testing.inputs import Random


@dataclass(frozen=True, kw_only=True)
class PagedAttentionCase(AttentionCase):
    """`lengths`: keys of each batch, the last of which is at the last query; `keys` is the largest of them.

    `spare`: more blocks in the table than the longest batch needs, of no meaning. `split_heads`: the cache is
    (blocks, Hkv, block size, D) in memory, else as its shape says. What is in no batch is NaN.
    """

    lengths: tuple[int, ...]
    block_size: int = 16
    spare: int = 1
    split_heads: bool = False
    bottom_right: bool = True

    @property
    def op(self) -> str:
        return "paged_attention"

    @property
    def leaves(self) -> tuple[str, ...]:
        return ()

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Tensors:
        x = super().inputs(dtype, device, seed)
        random, size = Random(seed + 1, device), self.block_size
        needed = [-(-length // size) for length in self.lengths]
        room = max(needed) + self.spare
        places = torch.rand(sum(needed) + 2, generator=random.generator, device=device).argsort()
        table = torch.full((len(self.lengths), room), -7, device=device, dtype=torch.int32)
        for b, count in enumerate(needed):
            table[b, :count] = places[sum(needed[:b]) :][:count]
        for name in ("key", "value"):
            shape = (len(places), size, x[name].shape[1], x[name].shape[3])
            cache = torch.full(shape, torch.nan, dtype=dtype, device=device)
            for b, (length, count) in enumerate(zip(self.lengths, needed, strict=True)):
                rows = torch.full((count * size, *shape[2:]), torch.nan, dtype=dtype, device=device)
                rows[:length] = x[name][b, :, :length].transpose(0, 1)
                cache[table[b, :count].long()] = rows.view(count, *shape[1:])
            x[f"{name}_cache"] = cache.transpose(1, 2).contiguous().transpose(1, 2) if self.split_heads else cache
        x["block_table"] = table
        x["cache_seqlens"] = torch.tensor(self.lengths, dtype=torch.int32, device=device)
        return x

    def _modifiers(self, x: Tensors) -> dict[str, object]:
        taken = ("causal", "window", "softcap", "alibi_slopes", "sinks", "return_lse")
        return {n: value for n, value in super()._modifiers(x).items() if n in taken}

    def _arguments(self, x: Tensors) -> tuple[torch.Tensor, ...]:
        return tuple(x[n] for n in ("query", "key_cache", "value_cache", "block_table", "cache_seqlens"))

    def ours(self, x: Tensors) -> Tensors:
        return self._named(ops.paged_attention(*self._arguments(x), **self._modifiers(x)))  # type: ignore[arg-type]

    def reference(self, x: Tensors) -> Tensors:
        return self._named(reference.paged_attention(*self._arguments(x), **self._modifiers(x)))  # type: ignore[arg-type]

    def _batches(self, x: Tensors) -> Iterator[tuple[AttentionCase, Tensors]]:
        """Each batch as a case of its own, with its part of the inputs, gathered from the cache."""
        flags = {f.name: getattr(self, f.name) for f in fields(AttentionCase)} | {"batch": 1}
        for b, length in enumerate(self.lengths):
            part = {n: t for n, t in x.items() if n in ("alibi_slopes", "sinks")}
            part |= {n: x[n][b : b + 1] for n in ("query", "doutput")}
            for n in ("key", "value"):
                blocks = x["block_table"][b, : -(-length // self.block_size)].long()
                part[n] = x[f"{n}_cache"][blocks].flatten(0, 1)[:length].transpose(0, 1).unsqueeze(0)
            yield AttentionCase(**flags | {"keys": length}), part

    def torch(self, x: Tensors) -> Tensors:
        found = [case.torch(part) if case.keys else case._composed(part) for case, part in self._batches(x)]
        return {n: torch.cat([f[n] for f in found]) for n in found[0]}

    def terms(self, x: Tensors) -> Mapping[str, Tensor | float]:
        return self._joined([case.terms(part) for case, part in self._batches(x)])

    def zeros(self, x: Tensors) -> Tensors:
        return self._joined([case.zeros(part) for case, part in self._batches(x)])

    def _joined(self, found: list[Any]) -> Any:
        return {n: torch.cat([f[n] for f in found]) for n in ("output", "lse") if n in found[0]} if all(found) else {}


def _case(name: str, regime: str, queries: int, *lengths: int, **flags: object) -> PagedAttentionCase:
    sizes = {"queries": queries, "keys": max(lengths), "batch": len(lengths), "lengths": lengths}
    return PagedAttentionCase(name=name, regime=regime, **sizes | flags)  # type: ignore[arg-type]


PAGED_ATTENTION = (
    _case("1 x 40", "one query, two blocks and a half", 1, 40, heads=1, dim=32),
    _case("1 x 700, 0, 1, 16", "many splits beside an empty cache", 1, 700, 0, 1, 16, heads=4, kv_heads=2, lse=True),
    _case("1 x 300, D 128", "GQA 16:2, blocks of 7: no whole number of them in a tile", 1, 300, 33,
          heads=16, kv_heads=2, dim=128, block_size=7, spare=30),
    _case("1 x 200, D 39", "a head that is no whole vector, values of another size", 1, 200,
          dim=39, value_dim=70, block_size=64),
    _case("1 x 100, D 256", "the widest head, a block per key", 1, 100, 3, dim=256, block_size=1),
    _case("4 x 130 causal", "a draft to be verified", 4, 130, 67, 4, heads=4, kv_heads=2, causal=True, merged=True),
    _case("21 x 150 causal", "more rows than a tile; rows that see nothing", 21, 150, 9,
          heads=4, kv_heads=2, causal=True, lse=True, split_heads=True),
    _case("3 x 400, window", "splits left of the window", 3, 400, 90, causal=True, window=(100, None)),
    _case("2 x 260, everything", "sinks, also of an empty cache; ALiBi from each batch's own length", 2, 260, 0, 50,
          heads=4, kv_heads=2, causal=True, window=(200, None), softcap=3.0, alibi=True, sinks=True, lse=True),
)  # fmt: skip
