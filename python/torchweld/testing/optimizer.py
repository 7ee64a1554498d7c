"""Cases of the optimizers' steps: a few updates over a list of tensors, with every way that dtypes can be mixed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchweld import ops, reference
from torchweld.testing.case import Case, Tensors
from torchweld.testing.inputs import Random

LR, WEIGHT_DECAY = 1e-2, 0.1


@dataclass(frozen=True, kw_only=True)
class OptimizerCase(Case):
    """`updates` steps over tensors of these sizes; `state_dtype`: of the state, where it is not the parameters'."""

    sizes: tuple[int, ...]
    updates: int = 3
    state_dtype: torch.dtype | None = None
    grad_dtype: torch.dtype | None = None
    layout: str = "contiguous"
    grad_scale: float = 1.0
    masters: bool = False
    maximize: bool = False
    max_grad_norm: float | None = None

    @property
    @abstractmethod
    def states(self) -> tuple[str, ...]:
        """Names of the state in torch's optimizer."""

    @abstractmethod
    def call(self, of: Any, lists: dict[str, list[Tensor]], **options: Any) -> None:
        """One step by `torchweld.ops` or `torchweld.reference`."""

    @abstractmethod
    def optimizer(self, params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """torch's."""

    @property
    def _names(self) -> tuple[str, ...]:
        return ("param", *self.states, *(("master",) if self.masters else ()))

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Tensors:
        random, state, x = Random(seed, device), self.state_dtype or dtype, {}
        for i, size in enumerate(self.sizes):
            x[f"param{i}"] = random.normal(size, dtype=dtype, layout=self.layout)
            scale = self.grad_scale
            x[f"grad{i}"] = random.normal(size, dtype=self.grad_dtype or dtype, scale=scale, layout=self.layout)
            for name in self.states:
                square = name.endswith("sq")
                moment = random.normal(size, dtype=state, scale=scale if square else scale / 4, layout=self.layout)
                x[f"{name}{i}"] = moment.square_() if square else moment
            if self.masters:
                x[f"master{i}"] = random.normal(size, dtype=torch.float32, layout=self.layout)
                x[f"param{i}"].copy_(x[f"master{i}"])
        return x

    def _lists(self, x: Tensors) -> dict[str, list[Tensor]]:
        """Fresh copies of everything, for a step is in place; the steps start from 0."""
        names = (*self._names, "grad")
        lists = {n: [_copy(x[f"{n}{i}"]) for i in range(len(self.sizes))] for n in names}
        device = x["param0"].device
        return lists | {"step": [torch.zeros((), dtype=torch.float32, device=device) for _ in self.sizes]}

    def _outputs(self, lists: dict[str, list[Tensor]]) -> Tensors:
        return {f"{n}{i}": t for n in self._names for i, t in enumerate(lists[n])}

    def _call(self, of: Any, x: Tensors) -> Tensors:
        lists = self._lists(x)
        masters = {"masters": lists["master"]} if self.masters else {}
        for _ in range(self.updates):
            self.call(of, lists, maximize=self.maximize, max_grad_norm=self.max_grad_norm, **masters)
        return self._outputs(lists)

    def ours(self, x: Tensors) -> Tensors:
        return self._call(ops, x)

    def reference(self, x: Tensors) -> Tensors:
        return self._call(reference, x)

    def torch(self, x: Tensors) -> Tensors:
        lists = self._lists(x)
        mixed = self.masters or self.state_dtype is not None or self.grad_dtype is not None
        # torch does not mix dtypes: its user computes in float32 and rounds what is stored after every step.
        work = {n: [t.float() for t in each] for n, each in lists.items()} if mixed else lists
        if self.masters:
            work["param"] = work["master"]
        params = [torch.nn.Parameter(p) for p in work["param"]]
        for p, grad in zip(params, work["grad"], strict=True):
            p.grad = grad
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, self.max_grad_norm)
        optimizer = self.optimizer(params)
        for i, p in enumerate(params):
            optimizer.state[p] = {n: work[n][i] for n in (*self.states, "step")}
        for _ in range(self.updates):
            optimizer.step()
            for name, value in self._outputs(work).items():
                stored = self._outputs(lists)[name].copy_(value)
                if not (self.masters and name.startswith("param")):
                    value.copy_(stored)
        return self._outputs(lists)


def _copy(t: Tensor) -> Tensor:
    """A copy that starts as far past an aligned address as `t` does."""
    offset = t.storage_offset() % 16
    return t.new_empty(t.numel() + offset)[offset:].copy_(t) if t.is_contiguous() else t.clone()


def narrow(make: Callable[..., Case], name: str, regime: str, *sizes: int, **flags: object) -> Case:
    """State as narrow as the parameters. Not in float16, where a small gradient's square is 0 and its step 1 / eps."""
    return make(name=name, regime=regime, sizes=sizes, dtypes=(torch.float32, torch.bfloat16), **flags)


MIXED = (1, 7, 64, 0, 1009, 300)
WIDE: dict[str, Any] = {"state_dtype": torch.float32}
HALF: dict[str, Any] = {"dtypes": (torch.bfloat16, torch.float16)}
