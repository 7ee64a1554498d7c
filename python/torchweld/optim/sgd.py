"""SGD: torch's optimizer with a step of one pass over memory, and clipping by global norm inside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from torchweld import backend, ops
from torchweld._torch import check_once_for_fused
from torchweld.optim.fused import FusedOptimizer, Work
from torchweld.optim.state import Group, State


class SGD(FusedOptimizer, torch.optim.SGD):
    """`torch.optim.SGD` in one pass over memory: the same constructor, state_dict and behaviour.

    `max_grad_norm`, `master_weights`, `zero_grads`, `offload` and the rest are as in `torchweld.optim.AdamW`. A sparse
    gradient gets torch's own step.

    Sutskever, Martens, Dahl, Hinton: On the importance of initialization and momentum in deep learning, ICML 2013.
    """

    _torch = torch.optim.SGD
    _whole = staticmethod(backend.whole_call("sgd_step"))

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        master_weights: bool = False,
        zero_grads: bool = False,
        offload: str | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        self._add_options(
            max_grad_norm=max_grad_norm, master_weights=master_weights, zero_grads=zero_grads, offload=offload
        )

    def _unserved(self, group: Group) -> str | None:
        for flag in ("differentiable", "foreach"):
            if group[flag]:
                return f"{flag}=True"
        if isinstance(group["weight_decay"], Tensor):
            return "weight_decay given as a tensor"
        first = next((p for p in group["params"] if p.grad is not None), None) if group["fused"] else None
        if first is not None:
            check_once_for_fused(self, first)
        return None

    def _state_names(self, group: Group) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def _init_state(self, group: Group, param: Tensor, state: State) -> None:
        state["momentum_buffer"] = self._like(group, param)

    def _update(self, work: Work, **scalars: Any) -> None:
        group, lists = work.group, work.lists
        first = work.fresh and group["dampening"] != 0
        ops.sgd_(
            lists["param"],
            lists["grad"],
            lists.get("momentum_buffer", []),
            lr=group["lr"],
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=bool(group["nesterov"]),
            maximize=bool(group["maximize"]),
            first_step=first,
            masters=lists.get("master", ()),
            **scalars,
        )
        # Zeros are as good as no buffer but for dampening, which has no first step twice: the one look at found_inf.
        if first and scalars["found_inf"] is not None and float(scalars["found_inf"]):
            for p in work.params:
                self.state[p].pop("momentum_buffer", None)
