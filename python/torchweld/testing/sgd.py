"""Cases of sgd_."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchweld.testing.case import Case, Tensors
from torchweld.testing.optimizer import HALF, LR, MIXED, WEIGHT_DECAY, WIDE, OptimizerCase


@dataclass(frozen=True, kw_only=True)
class SgdCase(OptimizerCase):
    """SGD, from momentum buffers that have something in them."""

    momentum: float = 0.9
    dampening: float = 0.0
    nesterov: bool = False

    @property
    def op(self) -> str:
        return "sgd"

    @property
    def states(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.momentum else ()

    def call(self, of: Any, lists: dict[str, list[Tensor]], **options: Any) -> None:
        of.sgd_(
            *(lists.get(n, []) for n in ("param", "grad", "momentum_buffer")),
            lr=LR,
            momentum=self.momentum,
            dampening=self.dampening,
            weight_decay=WEIGHT_DECAY,
            nesterov=self.nesterov,
            **options,
        )

    def terms(self, x: Tensors) -> Mapping[str, Tensor | float]:
        """A buffer that a gradient nearly cancels keeps the rounding errors of both."""
        return {n: float(t.abs().max()) for n, t in x.items() if n.startswith("momentum_buffer") and t.numel()}

    def optimizer(self, params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            params,
            lr=LR,
            momentum=self.momentum,
            dampening=self.dampening,
            weight_decay=WEIGHT_DECAY,
            nesterov=self.nesterov,
            maximize=self.maximize,
            foreach=False,
        )


def _case(name: str, regime: str, *sizes: int, **flags: object) -> Case:
    return SgdCase(name=name, regime=regime, sizes=sizes, **flags)  # type: ignore[arg-type]


SGD = (
    _case("2 tensors", "ordinary", 64, 768),
    _case("sizes 0 to 1009", "tails, an empty tensor, several tensors in one range of work", *MIXED),
    _case("1 x 100003", "one tensor cut over the threads", 100003, nesterov=True),
    _case("unaligned", "no vector at an aligned address", *MIXED, layout="unaligned", dampening=0.5),
    _case("no momentum", "parameter and gradient alone", *MIXED, momentum=0.0, maximize=True),
    _case("fp32 state and grads", "only the parameters are narrow", *MIXED, grad_dtype=torch.float32, **WIDE),
    _case("masters", "the parameters are their roundings", *MIXED, masters=True, nesterov=True, **WIDE, **HALF),
    _case("clipped", "global norm far above the bound", *MIXED, max_grad_norm=0.5),
)
