"""AdamW: a whole optimizer step, over one huge tensor, over GPT-2's parameters and over many small ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from torchweld import optim, reference
from torchweld.bench.harness import Call, Settings, Work
from torchweld.models.gpt2 import CONFIGS, GPT2
from torchweld.testing import confirm, judge
from torchweld.testing.inputs import Random

_LR, _BETAS, _EPS, _WEIGHT_DECAY = 1e-3, (0.9, 0.95), 1e-8, 0.1
_SLICE = 1 << 24  # elements that are compared at a time: float64 of everything would not fit into memory


def _gpt2(config: str) -> list[torch.Size]:
    with torch.device("meta"):
        return [p.shape for p in GPT2(CONFIGS[config]).parameters()]


def _many_small() -> list[torch.Size]:
    sizes = torch.randint(1, 100_000, (2000,), generator=torch.Generator().manual_seed(0))
    return [torch.Size([int(n)]) for n in sizes]


@dataclass
class _Bench:
    """Providers that share parameters and gradients; each has moments of its own."""

    shapes: Sequence[torch.Size]
    dtype: torch.dtype
    device: str
    max_grad_norm: float | None

    def __post_init__(self) -> None:
        random = Random(0, self.device)
        self.params = [torch.nn.Parameter(random.normal(*s, dtype=self.dtype, scale=0.02)) for s in self.shapes]
        for p in self.params:
            p.grad = random.normal(*p.shape, dtype=self.dtype, scale=1e-2)
        options = {"lr": _LR, "betas": _BETAS, "eps": _EPS, "weight_decay": _WEIGHT_DECAY}
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "torchweld": optim.AdamW(self.params, max_grad_norm=self.max_grad_norm, **options),  # type: ignore[arg-type]
            "torch": torch.optim.AdamW(self.params, **options),  # type: ignore[arg-type]
            "torch:fused": torch.optim.AdamW(self.params, fused=True, **options),  # type: ignore[arg-type]
        }

    def calls(self) -> dict[str, Call]:
        return {name: self._call(name) for name in self.optimizers}

    def _call(self, name: str) -> Call:
        step = self.optimizers[name].step
        if self.max_grad_norm is None or name == "torchweld":  # ours clips inside the step
            return step

        def clip_and_step() -> None:
            torch.nn.utils.clip_grad_norm_(self.params, self.max_grad_norm or 0.0)
            step()

        return clip_and_step

    def check(self) -> dict[str, float]:
        """The first step of each, on the same values."""
        start = [(p.detach().clone(), _grad(p).clone()) for p in self.params]
        after: dict[str, list[Tensor]] = {}
        for name, call in self.calls().items():
            call()
            after[name] = [p.detach().clone() for p in self.params]
            for p, (value, grad) in zip(self.params, start, strict=True):
                p.detach().copy_(value)
                _grad(p).copy_(grad)
        norm = torch.linalg.vector_norm(torch.stack([g.double().norm() for _, g in start]))
        errors = dict.fromkeys(after, 0.0)
        for i, (value, grad) in enumerate(start):
            found = {name: self._found(name, i, after[name][i]) for name in after}
            for begin in range(0, value.numel(), _SLICE):
                part = slice(begin, begin + _SLICE)
                exact = self._exact(value.flatten()[part], grad.flatten()[part], norm)
                parts = {name: {n: t.flatten()[part] for n, t in each.items()} for name, each in found.items()}
                for name, each in parts.items():
                    verdicts = judge(each, parts["torch"], exact)
                    if name == "torchweld":
                        confirm(verdicts, "adamw", f"tensor {i} of {len(start)}")
                    errors[name] = max(errors[name], *(v.error for v in verdicts))
        return errors

    def _found(self, name: str, i: int, param: Tensor) -> dict[str, Tensor]:
        state = self.optimizers[name].state[self.params[i]]
        return {"param": param, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}

    def _exact(self, param: Tensor, grad: Tensor, norm: Tensor) -> dict[str, Tensor]:
        p, g = param.double(), grad.double()
        m, v, step = torch.zeros_like(p), torch.zeros_like(p), torch.zeros((), device=p.device)
        reference.adamw_(
            [p],
            [g],
            [m],
            [v],
            [],
            [step],
            lr=_LR,
            beta1=_BETAS[0],
            beta2=_BETAS[1],
            eps=_EPS,
            weight_decay=_WEIGHT_DECAY,
            max_grad_norm=self.max_grad_norm,
            grad_norm=None if self.max_grad_norm is None else norm,
        )
        return {"param": p, "exp_avg": m, "exp_avg_sq": v}


def _calls(bench: Callable[[], _Bench]) -> dict[str, Call]:
    return bench().calls()


def _check(bench: Callable[[], _Bench]) -> dict[str, float]:
    return bench().check()


def _grad(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


def adamw(settings: Settings) -> Iterator[Work]:
    """Every list and dtype, and once with clipping by global norm."""
    lists: dict[str, Callable[[], list[torch.Size]]] = {"GPT-2 124M": lambda: _gpt2("gpt2")}
    if settings.quick:
        lists = {"GPT-2 small": lambda: _gpt2("small")}
    elif settings.device == "cuda":
        lists |= {"2000 small": _many_small, "one tensor": lambda: [torch.Size([1_000_000_000])]}
    for dtype in settings.dtypes:
        for what, shapes in lists.items():
            for max_grad_norm in (None, 1.0) if what.startswith("GPT-2") else (None,):
                if "step" not in settings.directions:
                    continue
                found = shapes()
                name = f"{what}, {len(found)} tensors" + (", clipped" if max_grad_norm else "")
                count = sum(s.numel() for s in found)
                bench = cache(partial(_Bench, found, dtype, settings.device, max_grad_norm))
                # Bytes per parameter: reads p, g, m, v, writes p, m, v; clipping reads g once more.
                moved = dtype.itemsize * (7 if max_grad_norm is None else 8)
                yield Work(
                    op="adamw",
                    direction="step",
                    dtype=dtype,
                    case={"name": name, "tensors": len(found), "parameters": count, "max_grad_norm": max_grad_norm},
                    calls=partial(_calls, bench),
                    check=partial(_check, bench),
                    bytes=float(moved * count),
                    wall=len(found) > 1,
                )
