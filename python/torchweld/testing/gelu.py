"""Cases of gelu."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from torchweld import ops, reference
from torchweld.testing.case import Case, Tensors
from torchweld.testing.inputs import Random, shape_values


@dataclass(frozen=True, kw_only=True)
class GeluCase(Case):
    shape: tuple[int, ...]
    layout: str = "contiguous"
    scale: float = 2.0
    values: str = "normal"
    approximate: str = "tanh"

    @property
    def op(self) -> str:
        return "gelu"

    @property
    def leaves(self) -> tuple[str, ...]:
        return ("x",)

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Tensors:
        random = Random(seed, device)
        return {
            "x": shape_values(
                random.normal(*self.shape, dtype=dtype, scale=self.scale, layout=self.layout), self.values
            ),
            "doutput": random.normal(*self.shape, dtype=dtype, layout=self.layout),
        }

    def ours(self, x: Tensors) -> Tensors:
        return {"output": ops.gelu(x["x"], approximate=self.approximate)}

    def torch(self, x: Tensors) -> Tensors:
        return {"output": torch.nn.functional.gelu(x["x"], approximate=self.approximate)}

    def reference(self, x: Tensors) -> Tensors:
        return {"output": reference.gelu(x["x"], approximate=self.approximate)}


def _case(name: str, regime: str, *shape: int, **flags: object) -> GeluCase:
    return GeluCase(name=name, regime=regime, shape=shape, **flags)  # type: ignore[arg-type]


_TANH = (
    _case("8 x 64", "whole vectors", 8, 64),
    _case("1", "one element", 1),
    _case("0 x 3", "nothing", 0, 3),
    _case("1009", "a prime: a tail", 1009),
    _case("4 x 4096 + 1", "several chunks and one element", 16385),
    _case("9 x 100 unaligned", "no vector at an aligned address", 9, 100, layout="unaligned"),
    _case("9 x 100 strided", "non-contiguous, NaN between the elements", 9, 100, layout="strided"),
    _case("40 x 100 transposed", "non-contiguous, columns first", 40, 100, layout="transposed"),
    _case("500 of 1e-3", "near zero, where the slope is a half", 500, scale=1e-3),
    _case("500 of 30", "saturated on both sides", 500, scale=30.0),
    _case("500 of 1e4", "whose cubes leave float16", 500, scale=1e4),
)
GELU: tuple[Case, ...] = (*_TANH, *(replace(c, name=f"{c.name} exact", approximate="none") for c in _TANH))
