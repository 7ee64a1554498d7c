"""The rule of exactness for whole modules: ours beside torch's with the same parameters, both held to float64.

A module's result has gone through dozens of roundings, and has dozens of gradients: whether the largest error of one of
them is twice torch's is a matter of luck. So all gradients are judged as one tensor, each as a share of its own largest
value, and small inputs are best drawn several times.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchweld.testing.cases import Tensors
from torchweld.testing.parity import Parity, confirm, judge

Call = Callable[..., Tensor]


def _evaluate(module: torch.nn.Module, call: Call, draw: Sequence[Tensor]) -> Tensors:
    """The output of `call(module, *draw)`, and the gradients of the draw's tensors and of all parameters."""
    leaves = [x.detach().clone().requires_grad_() for x in draw]
    module.zero_grad(set_to_none=True)
    output = call(module, *leaves)
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64, device=output.device)
    output.backward(weights.to(output.dtype).view(output.shape))
    grads = {f"d{i}": x.grad for i, x in enumerate(leaves)} | {f"d{n}": p.grad for n, p in module.named_parameters()}
    module.zero_grad(set_to_none=True)
    return {"output": output.detach()} | {n: g for n, g in grads.items() if g is not None}


def _summed_up(draws: Sequence[Tensors], exact: Sequence[Tensors]) -> Tensors:
    """The outputs of all draws, and all their gradients, each over the largest of its exact values."""
    shares = []
    for draw, right in zip(draws, exact, strict=True):
        if draw.keys() != right.keys():
            raise AssertionError(f"expected the gradients {sorted(right)}, but got {sorted(draw)}")
        for name, t in draw.items():
            largest = float(right[name].abs().max()) if t.numel() else 0.0
            shares.append(t.double().flatten() / (largest or 1.0))
    return {"output": torch.stack([d["output"] for d in draws]), "gradients": torch.cat(shares)}


def judge_module(
    ours: torch.nn.Module, theirs: torch.nn.Module, call: Call, draws: Sequence[Sequence[Tensor]]
) -> list[Parity]:
    """The verdicts on the outputs and on all gradients of `call(module, *draw)`, over all draws together."""
    wide = copy.deepcopy(theirs).double()
    exact = [_evaluate(wide, call, [x.double() for x in draw]) for draw in draws]
    got, expected = (_summed_up([_evaluate(m, call, draw) for draw in draws], exact) for m in (ours, theirs))
    return judge(got, expected, _summed_up(exact, exact))


def check_module(
    ours: torch.nn.Module, theirs: torch.nn.Module, call: Call, draws: Sequence[Sequence[Tensor]], case: str
) -> None:
    """As `judge_module`, but raises AssertionError on a miss."""
    confirm(judge_module(ours, theirs, call, draws), type(theirs).__name__, case)
