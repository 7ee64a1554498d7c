"""A case of attention over packed sequences. Each sequence is also a case by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from torchweld import reference
from torchweld.testing.attention_case import AttentionCase
from torchweld.testing.case import Tensors


@dataclass(frozen=True, kw_only=True)
class PackedAttentionCase(AttentionCase):
    """`lengths`: queries and keys of each of the packed sequences; `queries` and `keys` are their totals."""

    lengths: tuple[tuple[int, int], ...]

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Tensors:
        x = super().inputs(dtype, device, seed)
        for name in ("query", "key", "value", "doutput"):
            x[name] = x[name][0].transpose(0, 1).contiguous()
        if self.lse:
            x["dlse"] = x["dlse"][0]
        for name, side in (("cu_seqlens_q", 0), ("cu_seqlens_k", 1)):
            starts = torch.tensor([0, *(pair[side] for pair in self.lengths)], device=device).cumsum(0)
            x[name] = starts.to(torch.int32)
        return x

    def _modifiers(self, x: Tensors) -> dict[str, object]:
        packed = {name: x[name] for name in ("cu_seqlens_q", "cu_seqlens_k")}
        return super()._modifiers(x) | packed

    def reference(self, x: Tensors) -> Tensors:
        return self._named(reference.attention(x["query"], x["key"], x["value"], **self._modifiers(x)))  # type: ignore[arg-type]

    def _sequences(self, x: Tensors) -> Iterator[tuple[AttentionCase, Tensors]]:
        """Each sequence as a case, with its part of the inputs."""
        flags = {f.name: getattr(self, f.name) for f in fields(AttentionCase)}
        starts = zip(x["cu_seqlens_q"].tolist(), x["cu_seqlens_k"].tolist(), strict=True)
        for (q, k), (queries, keys) in zip(starts, self.lengths, strict=False):
            part = {n: t for n, t in x.items() if n in ("alibi_slopes", "sinks", "seed")}
            for name, start, count in (
                ("query", q, queries),
                ("doutput", q, queries),
                ("key", k, keys),
                ("value", k, keys),
            ):
                if name in x:
                    part[name] = x[name][start : start + count].transpose(0, 1).unsqueeze(0)
            if self.dropout:
                part["kept"] = x["kept"][:, :, q : q + queries, :keys]
            yield AttentionCase(**flags | {"queries": queries, "keys": keys}), part

    def torch(self, x: Tensors) -> Tensors:
        found = [
            case.torch(part) if case.queries and case.keys else case._composed(part)
            for case, part in self._sequences(x)
        ]
        outputs = {"output": torch.cat([f["output"][0].transpose(0, 1) for f in found])}
        return outputs | ({"lse": torch.cat([f["lse"][0] for f in found], 1)} if self.lse else {})

    def terms(self, x: Tensors) -> Mapping[str, Tensor | float]:
        return self._joined([case.terms(part) for case, part in self._sequences(x)])

    def zeros(self, x: Tensors) -> Tensors:
        return self._joined([case.zeros(part) for case, part in self._sequences(x)])

    def _joined(self, found: list[Any]) -> Any:
        """The values of all sequences as one tensor; nothing if a sequence has none."""
        if not found or not all(found):
            return {}
        joined = {
            n: torch.cat([f[n][0].transpose(0, 1) for f in found]) for n in ("output", "dquery", "dkey", "dvalue")
        }
        if "lse" in found[0] and self.lse:
            joined["lse"] = torch.cat([f["lse"][0] for f in found], 1)
        for n in ("dalibi_slopes", "dsinks"):
            if n in found[0]:
                each = torch.stack([f[n] for f in found])
                joined[n] = each.all(0) if each.dtype is torch.bool else each.sum(0)
        return joined
