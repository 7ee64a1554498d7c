"""The rule of exactness for whole modules: ours beside torch's with the same parameters, both held to float64.

A module has dozens of gradients, each behind dozens of roundings: whether the largest error of one of them is twice
torch's is a matter of luck. So all of them are judged together, each as a share of its own largest value, over several
trials where the tensors are small: the root mean square of the errors by the rule, the largest by twice its allowance.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchweld.testing.case import Tensors
from torchweld.testing.parity import Parity, confirm, judge


@dataclass(frozen=True)
class Trial:
    """One call of two modules: `call(module, *inputs)`, all inputs being such that they have a gradient.

    `exact`: what is right in float64; None for `theirs`, where that computes in float64 what it is given in float64.
    """

    ours: torch.nn.Module
    theirs: torch.nn.Module
    call: Callable[..., Tensor]
    inputs: Sequence[Tensor]
    exact: torch.nn.Module | None = None

    def evaluate_exactly(self) -> Tensors:
        """In float64, on a copy."""
        module = copy.deepcopy(self.theirs if self.exact is None else self.exact).double()
        return evaluate_module(module, self.call, [x.double() for x in self.inputs])


def evaluate_module(module: torch.nn.Module, call: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensors:
    """The output of `call(module, *inputs)`, and the gradients of the inputs and of all parameters."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    module.zero_grad(set_to_none=True)
    output = call(module, *leaves)
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64, device=output.device)
    output.backward(weights.to(output.dtype).view(output.shape))
    grads = {f"d{i}": x.grad for i, x in enumerate(leaves)} | {f"d{n}": p.grad for n, p in module.named_parameters()}
    module.zero_grad(set_to_none=True)
    return {"output": output.detach()} | {n: g for n, g in grads.items() if g is not None}


def _shares(results: Sequence[Tensors], exact: Sequence[Tensors]) -> Tensor:
    """The errors of all gradients of all trials, each over the largest exact value of its gradient."""
    shares = []
    for result, right in zip(results, exact, strict=True):
        if result.keys() != right.keys():
            raise AssertionError(f"expected gradients of {sorted(right)}, but got {sorted(result)}")
        for name in right.keys() - {"output"}:
            largest = float(right[name].abs().max()) if right[name].numel() else 0.0
            shares.append((result[name].double() - right[name]).flatten() / (largest or 1.0))
    return torch.cat(shares) if shares else torch.zeros(1, dtype=torch.float64)


def _verdict(what: str, error: Tensor, torch_error: Tensor, factor: int, dtype: torch.dtype) -> Parity:
    allowed = factor * float(torch_error) + torch.finfo(dtype).eps
    problem = f"{float(error):.3g} for torch's {float(torch_error):.3g}, allowed {allowed:.3g}"
    return Parity(what, float(error), float(torch_error), allowed, None if float(error) <= allowed else problem)


def judge_modules(trials: Sequence[Trial], gradients: bool = True) -> list[Parity]:
    """The verdicts on the outputs and on all gradients of all trials together."""
    exact = [t.evaluate_exactly() for t in trials]
    ours = [evaluate_module(t.ours, t.call, t.inputs) for t in trials]
    theirs = [evaluate_module(t.theirs, t.call, t.inputs) for t in trials]
    got, expected, right = (
        {"output": torch.cat([r["output"].flatten() for r in results])} for results in (ours, theirs, exact)
    )
    verdicts = judge(got, expected, right)
    if gradients:
        error, torch_error = _shares(ours, exact), _shares(theirs, exact)
        dtype = got["output"].dtype
        verdicts += [
            _verdict("gradients, rms", error.square().mean().sqrt(), torch_error.square().mean().sqrt(), 2, dtype),
            _verdict("gradients, largest", error.abs().max(), torch_error.abs().max(), 4, dtype),
        ]
    return verdicts


def check_modules(trials: Sequence[Trial], case: str, gradients: bool = True) -> list[Parity]:
    """As `judge_modules`, but raises AssertionError on a miss."""
    return confirm(judge_modules(trials, gradients), type(trials[0].theirs).__name__, case)
