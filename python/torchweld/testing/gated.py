"""Cases of swiglu and geglu."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from torchweld import ops, reference
from torchweld.testing.case import Case, Tensors
from torchweld.testing.inputs import Random, shape_values


@dataclass(frozen=True, kw_only=True)
class GatedCase(Case):
    """`packed`: gate and up are the halves of one tensor's last dimension."""

    shape: tuple[int, ...]
    layout: str = "contiguous"
    packed: bool = False
    scale: float = 2.0
    values: str = "normal"
    activation: str = "silu"  # or the `approximate` of geglu

    @property
    def op(self) -> str:
        return "swiglu" if self.activation == "silu" else "geglu"

    @property
    def leaves(self) -> tuple[str, ...]:
        return ("gate",) if self.packed else ("gate", "up")

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Tensors:
        random = Random(seed, device)

        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return random.normal(*shape, dtype=dtype, scale=scale, layout=self.layout)

        *rows, columns = self.shape
        wide = (*rows, 2 * columns) if self.packed else self.shape
        found = {"gate": shape_values(normal(*wide, scale=self.scale), self.values)}
        if not self.packed:
            found["up"] = shape_values(normal(*self.shape), self.values)
        return found | {"doutput": normal(*self.shape)}

    def ours(self, x: Tensors) -> Tensors:
        if self.activation == "silu":
            return {"output": ops.swiglu(x["gate"], x.get("up"))}
        return {"output": ops.geglu(x["gate"], x.get("up"), approximate=self.activation)}

    def torch(self, x: Tensors) -> Tensors:
        gate, up = x["gate"].chunk(2, -1) if self.packed else (x["gate"], x["up"])
        if self.activation == "silu":
            return {"output": functional.silu(gate) * up}
        return {"output": functional.gelu(gate, approximate=self.activation) * up}

    def reference(self, x: Tensors) -> Tensors:
        if self.activation == "silu":
            return {"output": reference.swiglu(x["gate"], x.get("up"))}
        return {"output": reference.geglu(x["gate"], x.get("up"), approximate=self.activation)}


def _case(name: str, regime: str, *shape: int, **flags: object) -> GatedCase:
    return GatedCase(name=name, regime=regime, shape=shape, **flags)  # type: ignore[arg-type]


SWIGLU = (
    _case("8 x 64", "whole vectors", 8, 64),
    _case("8 x 64 packed", "whole vectors, in rows of another length", 8, 64, packed=True),
    _case("1", "one element", 1),
    _case("0 x 3", "nothing", 0, 3),
    _case("2 x 0 packed", "rows without elements", 2, 0, packed=True),
    _case("1009", "a prime: a tail", 1009),
    _case("3 x 5 x 37 packed", "rows that start at no aligned address", 3, 5, 37, packed=True),
    _case("4 x 4096 + 1", "several blocks and one element", 16385),
    _case("3 x 5000 packed", "rows of two blocks", 3, 5000, packed=True),
    _case("9 x 100 unaligned", "no vector at an aligned address", 9, 100, layout="unaligned"),
    _case("9 x 100 strided", "non-contiguous, NaN between the elements", 9, 100, layout="strided"),
    _case("40 x 100 transposed", "non-contiguous, columns first", 40, 100, layout="transposed"),
    _case("520 x 4096 packed", "past the caches", 520, 4096, packed=True),
    _case("500 of 1e-3", "near zero, where the slope is a half", 500, scale=1e-3),
    _case("500 of 30", "saturated on both sides", 500, scale=30.0),
    _case("500 of 300", "where exponentials underflow", 500, scale=300.0),
)
GEGLU: tuple[Case, ...] = tuple(
    replace(case, name=f"{case.name}{suffix}", activation=form)
    for form, suffix in (("none", ""), ("tanh", " tanh"))
    for case in SWIGLU
)
