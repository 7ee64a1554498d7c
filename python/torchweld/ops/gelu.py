"""gelu: the tanh approximation that GPT-2 uses, fused forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchweld import backend, reference
from torchweld.ops._register import (
    NotDenseError,
    applier,
    as_torch_does,
    check_dense,
    check_memory,
    double_backward,
    elsewhere,
    register,
    settle,
    shown,
    wants_definition,
    wants_grad,
)

_twin = torch.nn.functional.gelu  # a program may give its name to ours
_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))

# ---- Implementation


def _forward(input: Tensor) -> Tensor:
    x = settle(input, "[gelu] input")
    output = torch.empty_like(x)
    backend.kernels[x.device.type].gelu_forward(x, output)
    return output


def _backward(doutput: Tensor, input: Tensor) -> Tensor:
    x = settle(input, "[gelu] input")
    dinput = torch.empty_like(x)
    backend.kernels[x.device.type].gelu_backward(settle(doutput, "[gelu] gradient of the output"), x, dinput)
    return dinput


# ---- Fake


def _forward_fake(input: Tensor) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def _backward_fake(doutput: Tensor, input: Tensor) -> Tensor:
    return _forward_fake(input)


_forward_op = register("gelu_forward(Tensor input) -> Tensor", _forward, _forward_fake)
_backward_op = register("gelu_backward(Tensor doutput, Tensor input) -> Tensor", _backward, _backward_fake)

# ---- Autograd


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.save_for_backward(input)
        return _forward_op(input)

    @staticmethod
    def backward(ctx: Any, doutput: Tensor) -> Tensor | None:
        (input,) = ctx.saved_tensors
        if wants_definition(doutput):
            return double_backward(lambda x: reference.gelu(x, "tanh"), (input,), (doutput,), (True,))[0]
        return _backward_op(doutput, input)


_gelu = applier(_Gelu)

# ---- Public


def _refusal(input: Tensor) -> str | None:
    """Why the kernels do not take this call; None if they do."""
    if input.dtype not in _DTYPES:
        return f"input of dtype {input.dtype}"
    return "no CUDA kernel for it yet" if input.is_cuda else None


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """The Gaussian error linear unit; drop-in for `torch.nn.functional.gelu` (arXiv:1606.08415).

    Args:
        input: any shape; the kernels take float32, bfloat16 and float16.
        approximate: "tanh" for 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), which the kernels compute; "none"
            for the exact function, which torch's own kernel already does at the speed of memory and does here too.

    Raises:
        RuntimeError: another `approximate`.
        TypeError: input is not floating point.
    """
    if not isinstance(approximate, str) or approximate not in ("none", "tanh"):
        raise RuntimeError(f"[gelu] approximate: expected 'none' or 'tanh', but got {shown(approximate)}")
    if theirs := elsewhere(gelu, _twin, ("input",), input):
        return theirs(input, approximate=approximate)
    try:
        check_dense("gelu", input=input)
    except NotDenseError as error:
        return as_torch_does(error, _twin, input, approximate=approximate)
    if input.is_quantized:
        return _twin(input, approximate=approximate)
    if not input.dtype.is_floating_point:
        raise TypeError(f"[gelu] input: expected a floating-point dtype, but got {input.dtype}")
    if approximate == "none":
        check_memory("gelu", input=input)
        return _twin(input)
    if backend.choose("gelu", input.device, _refusal(input)) == "reference":
        check_memory("gelu", input=input)
        return reference.gelu(input, approximate)
    return _gelu(input) if wants_grad(input) else _forward_op(input)
