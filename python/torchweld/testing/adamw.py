"""Cases of adamw_."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchweld.testing.case import Case, Tensors
from torchweld.testing.optimizer import HALF, LR, MIXED, WEIGHT_DECAY, WIDE, OptimizerCase, narrow

_BETAS = (0.9, 0.95)


@dataclass(frozen=True, kw_only=True)
class AdamWCase(OptimizerCase):
    """AdamW, or Adam where the weight decay is not decoupled."""

    eps: float = 1e-8
    amsgrad: bool = False
    decoupled: bool = True

    @property
    def op(self) -> str:
        return "adamw"

    @property
    def states(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if self.amsgrad else ()))

    def terms(self, x: Tensors) -> Mapping[str, Tensor | float]:
        """A step is rounded eight times before it is taken, by half an ulp each.

        Where the second moment is small, it is far larger than the parameter and than the steps of all others, and the
        errors that torch makes with those say nothing of it.
        """
        after = self.reference(x)
        return {n: 4 * (after[n] - x[n]).abs() for n in after if n.startswith("param") and x[n].numel()}

    def call(self, of: Any, lists: dict[str, list[Tensor]], **options: Any) -> None:
        of.adamw_(
            *(lists.get(n, []) for n in ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step")),
            lr=LR,
            beta1=_BETAS[0],
            beta2=_BETAS[1],
            eps=self.eps,
            weight_decay=WEIGHT_DECAY,
            decoupled=self.decoupled,
            amsgrad=self.amsgrad,
            **options,
        )

    def optimizer(self, params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return (torch.optim.AdamW if self.decoupled else torch.optim.Adam)(
            params,
            lr=LR,
            betas=_BETAS,
            eps=self.eps,
            weight_decay=WEIGHT_DECAY,
            amsgrad=self.amsgrad,
            maximize=self.maximize,
            foreach=False,
        )


def _case(name: str, regime: str, *sizes: int, **flags: object) -> Case:
    return AdamWCase(name=name, regime=regime, sizes=sizes, **flags)  # type: ignore[arg-type]


_narrow = partial(narrow, AdamWCase)

ADAMW = (
    _narrow("2 tensors", "ordinary", 64, 768),
    _narrow("sizes 0 to 1009", "tails, an empty tensor, several tensors in one range of work", *MIXED),
    _narrow("1 x 100003", "one tensor cut over the threads", 100003),
    _narrow("80 x 33", "more tensors than ranges of work", *(33,) * 80),
    _narrow("unaligned", "no vector at an aligned address", *MIXED, layout="unaligned"),
    _narrow("strided", "non-contiguous, NaN between the elements", 64, 300, layout="strided"),
    _case("fp32 state", "moments wider than the parameters", *MIXED, **WIDE),
    _case("fp32 state and grads", "only the parameters are narrow", 64, 300, grad_dtype=torch.float32, **WIDE),
    _case("masters", "the parameters are their roundings", *MIXED, masters=True, **WIDE, **HALF),
    _case(
        "masters, unaligned",
        "no vector at an aligned address",
        *MIXED,
        masters=True,
        layout="unaligned",
        **WIDE,
        **HALF,
    ),
    _case("masters, amsgrad", "five wide streams", 64, 1009, masters=True, amsgrad=True, **WIDE, **HALF),
    _case("eps 0.1", "moments in float16 too", *MIXED, eps=0.1),
    _narrow("amsgrad", "a fourth state tensor", *MIXED, amsgrad=True),
    _narrow("maximize", "ascent", 64, 300, maximize=True),
    _narrow("Adam", "weight decay as an L2 term", *MIXED, decoupled=False),
    _narrow("clipped", "global norm far above the bound", *MIXED, max_grad_norm=0.5),
    _narrow("not clipped", "global norm below the bound", *MIXED, max_grad_norm=1e3),
    _narrow("first step", "bias correction at its largest", 64, 300, updates=1),
    _narrow("gradients of 1e-4", "the root of the second moment near eps", 64, 300, grad_scale=1e-4),
)
