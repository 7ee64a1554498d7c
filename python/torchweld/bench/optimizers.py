"""AdamW and SGD: a whole optimizer step, over one huge tensor, over GPT-2's parameters and over many small ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from torchweld import optim, reference
from torchweld.bench.harness import Call, Settings, Work
from torchweld.models.gpt2 import CONFIGS, GPT2
from torchweld.testing import confirm, judge
from torchweld.testing.inputs import Random

_OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1},
    "sgd": {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1},
}
_STATE = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
_EDGE = 1 << 14  # elements at each end of a tensor that are compared with float64; all elements would take minutes


@dataclass(frozen=True)
class _Variant:
    """Options of torchweld's optimizer that torch does not have; `bytes`: moved per parameter with them."""

    name: str
    bytes: int
    options: dict[str, Any] = field(default_factory=dict)
    wide_state: bool = False


def _variants(op: str, dtype: torch.dtype) -> Iterator[_Variant]:
    """Bytes per parameter: the step reads p, g and the state, writes p and the state. Clipping reads g once more."""
    size, states = dtype.itemsize, len(_STATE[op])
    yield _Variant("", (3 + 2 * states) * size)
    yield _Variant("clipped", (4 + 2 * states) * size, {"max_grad_norm": 1.0})
    if op == "adamw" and dtype == torch.bfloat16:
        yield _Variant("fp32 state", 22, wide_state=True)
        yield _Variant("fp32 state, stochastic rounding", 22, {"stochastic_rounding": True})
        yield _Variant("fp32 state, master weights", 30, {"master_weights": True})


def _gpt2(config: str) -> list[torch.Size]:
    with torch.device("meta"):
        return [p.shape for p in GPT2(CONFIGS[config]).parameters()]


def _many_small() -> list[torch.Size]:
    sizes = torch.randint(1, 100_000, (2000,), generator=torch.Generator().manual_seed(0))
    return [torch.Size([int(n)]) for n in sizes]


@dataclass
class _Bench:
    """Providers with the same parameters and gradients, or with copies if there are masters. Each has its own state."""

    op: str
    shapes: Sequence[torch.Size]
    dtype: torch.dtype
    device: str
    variant: _Variant

    def __post_init__(self) -> None:
        random = Random(0, self.device)
        self.params = [torch.nn.Parameter(random.normal(*s, dtype=self.dtype, scale=0.02)) for s in self.shapes]
        for p in self.params:
            p.grad = random.normal(*p.shape, dtype=self.dtype, scale=1e-2)
        self.ours = self.params
        if "master_weights" in self.variant.options:  # nothing else may write to parameters with masters
            self.ours = [torch.nn.Parameter(p.detach().clone()) for p in self.params]
            for p, q in zip(self.ours, self.params, strict=True):
                p.grad = q.grad
        ours, theirs = {"adamw": (optim.AdamW, torch.optim.AdamW), "sgd": (optim.SGD, torch.optim.SGD)}[self.op]
        options = _OPTIONS[self.op]
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "torchweld": ours(self.ours, **options, **self.variant.options),
            "torch": theirs(self.params, **options),
            "torch:fused": theirs(self.params, fused=True, **options),
        }
        if self.variant.wide_state:
            for p in self.params:
                state = {n: torch.zeros_like(p, dtype=torch.float32) for n in _STATE[self.op]}
                self.optimizers["torchweld"].state[p] = {"step": torch.zeros(()), **state}

    def calls(self) -> dict[str, Call]:
        return {name: self._call(name) for name in self.optimizers}

    def _call(self, name: str) -> Call:
        step, limit = self.optimizers[name].step, self.variant.options.get("max_grad_norm")
        if limit is None or name == "torchweld":  # torchweld's clips inside the step
            return step

        def clip_and_step() -> None:
            torch.nn.utils.clip_grad_norm_(self.params, limit)
            step()

        return clip_and_step

    def _params(self, name: str) -> list[torch.nn.Parameter]:
        return self.ours if name == "torchweld" else self.params

    def check(self) -> dict[str, float]:
        """Compares the first step of each: the parameters, and the state if its dtype is the same."""
        start = [(p.detach().clone(), _grad(p).clone()) for p in self.params]
        names = () if self.variant.name.startswith("fp32 state") else _STATE[self.op]
        found: dict[str, list[dict[str, Tensor]]] = {}
        for name, call in self.calls().items():
            call()
            found[name] = []
            for p, (value, grad) in zip(self._params(name), start, strict=True):
                state = self.optimizers[name].state[p]
                found[name].append({n: _edges(t) for n, t in (("param", p.detach()), *((n, state[n]) for n in names))})
                p.detach().copy_(value)
                _grad(p).copy_(grad)
        norm = torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for _, g in start])
        )
        errors = dict.fromkeys(found, 0.0)
        for i, (value, grad) in enumerate(start):
            exact = {n: t for n, t in self._exact(_edges(value), _edges(grad), norm).items() if n in ("param", *names)}
            for name, each in found.items():
                verdicts = judge(each[i], found["torch"][i], exact)
                if name == "torchweld":
                    confirm(verdicts, self.op, f"tensor {i} of {len(start)}")
                errors[name] = max(errors[name], *(v.error for v in verdicts))
        return errors

    def _exact(self, param: Tensor, grad: Tensor, norm: Tensor) -> dict[str, Tensor]:
        p, g = param.double(), grad.double()
        state = [torch.zeros_like(p) for _ in _STATE[self.op]]
        options = dict(_OPTIONS[self.op])
        if limit := self.variant.options.get("max_grad_norm"):
            options |= {"max_grad_norm": limit, "grad_norm": norm}
        if self.op == "adamw":
            options["beta1"], options["beta2"] = options.pop("betas")
            step = torch.zeros((), device=p.device)
            reference.adamw_([p], [g], [state[0]], [state[1]], [], [step], **options)
        else:
            reference.sgd_([p], [g], [state[0]], **options)
        return {"param": p, **dict(zip(_STATE[self.op], state, strict=True))}


def _edges(t: Tensor) -> Tensor:
    """A copy of both ends of a tensor."""
    flat = t.flatten()
    return flat.clone() if flat.numel() <= 2 * _EDGE else torch.cat((flat[:_EDGE], flat[-_EDGE:]))


def _calls(bench: Callable[[], _Bench]) -> dict[str, Call]:
    return bench().calls()


def _check(bench: Callable[[], _Bench]) -> dict[str, float]:
    return bench().check()


def _grad(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


def optimizers(op: str, settings: Settings) -> Iterator[Work]:
    """Every list, dtype and variant; all variants on GPT-2's parameters only."""
    lists: dict[str, Callable[[], list[torch.Size]]] = {"GPT-2 124M": lambda: _gpt2("gpt2")}
    if settings.quick:
        lists = {"GPT-2 small": lambda: _gpt2("small")}
    elif settings.device == "cuda":
        lists |= {"2000 small": _many_small, "one tensor": lambda: [torch.Size([1_000_000_000])]}
    if "step" not in settings.directions:
        return
    for dtype in settings.dtypes:
        for what, shapes in lists.items():
            yield from optimizer_steps(op, what, shapes(), dtype, settings, variants=what.startswith("GPT-2"))


def optimizer_steps(
    op: str, what: str, shapes: Sequence[torch.Size], dtype: torch.dtype, settings: Settings, variants: bool = False
) -> Iterator[Work]:
    """The step of one list of parameters: as torch has it, and with `variants` the options that torch does not have."""
    for variant in _variants(op, dtype):
        if variant.name and not variants:
            continue
        count = sum(s.numel() for s in shapes)
        name = f"{what}, {len(shapes)} tensors" + (f", {variant.name}" if variant.name else "")
        bench = cache(partial(_Bench, op, shapes, dtype, settings.device, variant))
        yield Work(
            op=op,
            direction="step",
            dtype=dtype,
            case={"name": name, "tensors": len(shapes), "parameters": count, **variant.options},
            calls=partial(_calls, bench),
            check=partial(_check, bench),
            bytes=float(variant.bytes * count),
            wall=len(shapes) > 1,
        )
