"""Cases of dropout."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchweld import ops, reference
from torchweld.reference.philox import dropout_factors
from torchweld.testing.case import Case, Tensors
from torchweld.testing.inputs import Random, shape_values


@dataclass(frozen=True, kw_only=True)
class DropoutCase(Case):
    shape: tuple[int, ...]
    p: float = 0.3
    layout: str = "contiguous"
    scale: float = 2.0
    values: str = "normal"

    @property
    def op(self) -> str:
        return "dropout"

    @property
    def leaves(self) -> tuple[str, ...]:
        return ("x",)

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Tensors:
        random = Random(seed, device)
        x = random.normal(*self.shape, dtype=dtype, scale=self.scale, layout=self.layout)
        return {
            "x": shape_values(x, self.values),
            "doutput": random.normal(*self.shape, dtype=dtype, layout=self.layout),
            "seed": torch.tensor([0x1234567890ABCDEF - seed], device=x.device),
        }

    def ours(self, x: Tensors) -> Tensors:
        return {"output": ops.dropout(x["x"], self.p, seed=x["seed"])}

    def torch(self, x: Tensors) -> Tensors:
        """By torch's formula, with our mask: torch takes no seed."""
        rows, cols = x["x"].flatten(0, -2).shape if x["x"].dim() > 1 else (1, x["x"].numel())
        factors = dropout_factors(x["seed"], rows, cols, self.p).view(x["x"].shape)
        return {"output": x["x"] * factors.to(x["x"].dtype)}

    def reference(self, x: Tensors) -> Tensors:
        return {"output": reference.dropout(x["x"], self.p, seed=x["seed"])}


def _case(name: str, regime: str, *shape: int, **flags: object) -> DropoutCase:
    return DropoutCase(name=name, regime=regime, shape=shape, **flags)  # type: ignore[arg-type]


DROPOUT: tuple[Case, ...] = (
    _case("8 x 64", "whole batches of random words", 8, 64),
    _case("1", "one element", 1),
    _case("0 x 3", "nothing", 0, 3),
    _case("301 x 7", "rows of less than one vector", 301, 7),
    _case("2 x 5 x 768", "batch dimensions, GPT-2's width", 2, 5, 768),
    _case("7 x 1009", "prime: a tail in each row", 7, 1009),
    _case("2 x 8193", "rows of several parts and one element", 2, 8193),
    _case("9 x 100 unaligned", "no vector at an aligned address", 9, 100, layout="unaligned"),
    _case("9 x 100 strided", "non-contiguous, NaN between the elements", 9, 100, layout="strided"),
    _case("40 x 100 transposed", "non-contiguous, columns first", 40, 100, layout="transposed"),
    _case("9 x 40 all dropped", "nothing is left", 9, 40, p=1.0),
    _case("9 x 40 of 0.999", "the scale is a thousand", 9, 40, p=0.999),
)
