"""Forward and backward of a differentiable op, on a case of the tests."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch

from torchweld import backend
from torchweld._torch import keep_donated_buffers
from torchweld.bench.harness import Call, Settings, Work
from torchweld.testing import Case, Oracle, Parity, confirm
from torchweld.testing.case import Provider, Tensors

_log = logging.getLogger("torchweld")
Cost = dict[str, dict[str, float]]  # by direction {"bytes": ...} or {"flops": ...}


def compiled(provider: Provider) -> Provider:
    """`torch.compile` for this size alone. The backward runs many times, so it must not free its buffers."""
    torch.compiler.reset()
    keep_donated_buffers()
    return torch.compile(provider, dynamic=False)


def works(
    case: Case,
    sizes: dict[str, Any],
    dtype: torch.dtype,
    settings: Settings,
    cost: Cost,
    timed_as_torch: Provider | None = None,
    **others: Provider,
) -> Iterator[Work]:
    """Work for each wanted direction: torchweld, torch and the `others` on the same inputs.

    `timed_as_torch` is timed in place of the case's torch, which is still what is judged: an op of torch that makes
    random numbers makes others than the case has.
    """
    providers = {"torchweld": case.ours, "torch": case.torch, **others}
    timed = {**providers, "torch": timed_as_torch or case.torch}
    if settings.compile:
        providers["torch.compile"] = timed["torch.compile"] = compiled(case.torch)
        if timed_as_torch is not None:
            timed["torch.compile"] = compiled(timed_as_torch)
    oracle = cache(lambda: Oracle(case, dtype, settings.device))
    judged = cache(lambda name: oracle().judge(providers[name], poison=name == "torchweld"))  # others run as they are

    def check(direction: str) -> dict[str, float]:
        with backend.strict():  # a time of the reference would mislead
            case.ours(case.inputs(dtype, settings.device))
        errors = {}
        for name in list(providers):
            try:
                found = judged(name)
            except RuntimeError as error:  # this GPU, or this torch, does not have one of torch's kernels
                if not name.startswith("torch:"):
                    raise
                _log.warning("%s is not timed for %s %s: %s", name, case.op, case.name, error)
                del providers[name], timed[name]
                continue
            verdicts = [v for v in found if _is_gradient(v, case) == (direction == "backward")]
            if name.startswith("torchweld"):
                confirm(verdicts, case.op, case.name)
            errors[name] = max(v.error for v in verdicts)
        return errors

    for direction in ("forward", "backward"):
        if direction in settings.directions:
            calls = partial(_calls, case, _forward if direction == "forward" else _backward, timed, oracle)
            yield Work(
                op=case.op,
                direction=direction,
                dtype=dtype,
                case=sizes,
                calls=calls,
                check=partial(check, direction),
                bytes=cost[direction].get("bytes"),
                flops=cost[direction].get("flops"),
            )


def _calls(
    case: Case,
    timed: Callable[[Case, Provider, Tensors], Call],
    providers: dict[str, Provider],
    oracle: Callable[[], Oracle],
) -> dict[str, Call]:
    return {name: timed(case, provider, oracle().inputs[0]) for name, provider in providers.items()}


def _is_gradient(verdict: Parity, case: Case) -> bool:
    return verdict.tensor.removeprefix("d") in case.leaves and verdict.tensor.startswith("d")


def _forward(case: Case, provider: Provider, x: Tensors) -> Call:
    return lambda: provider(x)  # the inputs require no gradients


def _backward(case: Case, provider: Provider, x: Tensors) -> Call:
    leaves = {n: x[n].detach().requires_grad_() for n in case.leaves if n in x}
    outputs = provider({**x, **leaves})
    results, inputs, grads = list(outputs.values()), list(leaves.values()), [x[f"d{n}"] for n in outputs]
    return lambda: torch.autograd.grad(results, inputs, grads, retain_graph=True)
