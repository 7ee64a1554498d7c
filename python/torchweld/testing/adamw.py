"""Cases of adamw_: a few steps over a list of tensors, with every way that dtypes can be mixed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchweld import ops, reference
from torchweld.testing.cases import Case, Tensors
from torchweld.testing.inputs import Random

_STATE = ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_LR, _BETAS, _WEIGHT_DECAY = 1e-2, (0.9, 0.95), 0.1


@dataclass(frozen=True, kw_only=True)
class AdamWCase(Case):
    """`updates` steps over tensors of these sizes; `state_dtype`: of the moments, where it is not the parameters'."""

    sizes: tuple[int, ...]
    updates: int = 3
    state_dtype: torch.dtype | None = None
    grad_dtype: torch.dtype | None = None
    layout: str = "contiguous"
    grad_scale: float = 1.0
    eps: float = 1e-8
    amsgrad: bool = False
    maximize: bool = False
    decoupled: bool = True
    max_grad_norm: float | None = None

    @property
    def op(self) -> str:
        return "adamw"

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Tensors:
        random, state, x = Random(seed, device), self.state_dtype or dtype, {}
        for i, size in enumerate(self.sizes):
            x[f"param{i}"] = random.normal(size, dtype=dtype, layout=self.layout)
            scale = self.grad_scale
            x[f"grad{i}"] = random.normal(size, dtype=self.grad_dtype or dtype, scale=scale, layout=self.layout)
            x[f"exp_avg{i}"] = random.normal(size, dtype=state, scale=scale / 4, layout=self.layout)
            for name in ("exp_avg_sq", "max_exp_avg_sq") if self.amsgrad else ("exp_avg_sq",):
                x[f"{name}{i}"] = random.normal(size, dtype=state, scale=scale, layout=self.layout).square_()
        return x

    def _lists(self, x: Tensors) -> dict[str, list[Tensor]]:
        """Fresh copies of everything, for a step is in place; the steps start from 0."""
        lists = {n: [_copy(x[f"{n}{i}"]) for i in range(len(self.sizes)) if f"{n}{i}" in x] for n in (*_STATE, "grad")}
        device = x["param0"].device
        return lists | {"step": [torch.zeros((), dtype=torch.float32, device=device) for _ in self.sizes]}

    def _outputs(self, lists: dict[str, list[Tensor]]) -> Tensors:
        return {f"{n}{i}": t for n in _STATE for i, t in enumerate(lists[n])}

    def _call(self, function: Callable[..., Tensor | None], x: Tensors) -> Tensors:
        lists = self._lists(x)
        for _ in range(self.updates):
            function(
                *(lists[n] for n in ("param", "grad", *_STATE[1:], "step")),
                lr=_LR,
                beta1=_BETAS[0],
                beta2=_BETAS[1],
                eps=self.eps,
                weight_decay=_WEIGHT_DECAY,
                decoupled=self.decoupled,
                amsgrad=self.amsgrad,
                maximize=self.maximize,
                max_grad_norm=self.max_grad_norm,
            )
        return self._outputs(lists)

    def ours(self, x: Tensors) -> Tensors:
        return self._call(ops.adamw_, x)

    def reference(self, x: Tensors) -> Tensors:
        return self._call(reference.adamw_, x)

    def torch(self, x: Tensors) -> Tensors:
        lists = self._lists(x)
        mixed = self.state_dtype is not None or self.grad_dtype is not None
        # torch does not mix dtypes: its user computes in float32 and rounds what is stored after every step.
        work = {n: [t.float() for t in each] for n, each in lists.items()} if mixed else lists
        params = [torch.nn.Parameter(p) for p in work["param"]]
        for p, grad in zip(params, work["grad"], strict=True):
            p.grad = grad
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, self.max_grad_norm)
        optimizer = (torch.optim.AdamW if self.decoupled else torch.optim.Adam)(
            params,
            lr=_LR,
            betas=_BETAS,
            eps=self.eps,
            weight_decay=_WEIGHT_DECAY,
            amsgrad=self.amsgrad,
            maximize=self.maximize,
            foreach=False,
        )
        for i, p in enumerate(params):
            optimizer.state[p] = {n: work[n][i] for n in (*_STATE[1:], "step") if work[n]}
        for _ in range(self.updates):
            optimizer.step()
            for stored, value in zip(self._outputs(lists).values(), self._outputs(work).values(), strict=True):
                value.copy_(stored.copy_(value))
        return self._outputs(lists)


def _copy(t: Tensor) -> Tensor:
    """A copy that starts as far past an aligned address as `t` does."""
    offset = t.storage_offset() % 16
    return t.new_empty(t.numel() + offset)[offset:].copy_(t) if t.is_contiguous() else t.clone()


def _case(name: str, regime: str, *sizes: int, **flags: object) -> Case:
    return AdamWCase(name=name, regime=regime, sizes=sizes, **flags)  # type: ignore[arg-type]


def _narrow(name: str, regime: str, *sizes: int, **flags: object) -> Case:
    """State as narrow as the parameters. Not in float16, where a small gradient's square is 0 and its step 1 / eps."""
    return _case(name, regime, *sizes, dtypes=(torch.float32, torch.bfloat16), **flags)


_MIXED = (1, 7, 64, 0, 1009, 300)
_WIDE = {"state_dtype": torch.float32}

ADAMW = (
    _narrow("2 tensors", "ordinary", 64, 768),
    _narrow("sizes 0 to 1009", "tails, an empty tensor, several tensors in one range of work", *_MIXED),
    _narrow("1 x 100003", "one tensor cut over the threads", 100003),
    _narrow("80 x 33", "more tensors than ranges of work", *(33,) * 80),
    _narrow("unaligned", "no vector at an aligned address", *_MIXED, layout="unaligned"),
    _narrow("strided", "non-contiguous, NaN between the elements", 64, 300, layout="strided"),
    _case("fp32 state", "moments wider than the parameters", *_MIXED, **_WIDE),
    _case("fp32 state and grads", "only the parameters are narrow", 64, 300, grad_dtype=torch.float32, **_WIDE),
    _case("eps 0.1", "moments in float16 too", *_MIXED, eps=0.1),
    _narrow("amsgrad", "a fourth state tensor", *_MIXED, amsgrad=True),
    _narrow("maximize", "ascent", 64, 300, maximize=True),
    _narrow("Adam", "weight decay as an L2 term", *_MIXED, decoupled=False),
    _narrow("clipped", "global norm far above the bound", *_MIXED, max_grad_norm=0.5),
    _narrow("not clipped", "global norm below the bound", *_MIXED, max_grad_norm=1e3),
    _narrow("first step", "bias correction at its largest", 64, 300, updates=1),
    _narrow("gradients of 1e-4", "the root of the second moment near eps", 64, 300, grad_scale=1e-4),
)
