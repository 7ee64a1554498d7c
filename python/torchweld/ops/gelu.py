"""gelu: exact or by the tanh approximation that GPT-2 uses, fused forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchweld import backend, reference
from torchweld.ops._arguments import (
    KERNEL_DTYPES,
    NotDenseError,
    as_torch_does,
    check_dense,
    check_float,
    defined,
    shown,
)
from torchweld.ops._register import (
    applier,
    compiling,
    differentiate,
    double_backward,
    elsewhere,
    memory_order,
    recorder,
    register,
    settle,
    wants_definition,
    wants_grad,
)

_twin = torch.nn.functional.gelu  # a program may replace it by the function below

# ---- Implementation. As in torch the output has the layout of the input: channels in front stay in front.


def _forward(input: Tensor, exact: bool = False) -> Tensor:
    if input.is_contiguous():
        return _run_forward(input, torch.empty_like(input), exact)
    output = torch.empty_like(input)
    order = memory_order(output)
    _run_forward(settle(input.permute(order), "[gelu] input"), output.permute(order), exact)
    return output


def _run_forward(x: Tensor, output: Tensor, exact: bool) -> Tensor:
    backend.kernels[x.device.type].gelu_forward(input=x, exact=exact, output=output)
    return output


def _backward(doutput: Tensor, input: Tensor, exact: bool = False) -> Tensor:
    dinput = torch.empty_like(input)
    order = memory_order(dinput)
    x, dx = settle(input.permute(order), "[gelu] input"), dinput.permute(order)
    doutput = settle(doutput.permute(order), "[gelu] gradient of the output")
    backend.kernels[x.device.type].gelu_backward(doutput=doutput, input=x, exact=exact, dinput=dx)
    return dinput


# ---- Fake


def _forward_fake(input: Tensor, exact: bool = False) -> Tensor:
    return torch.empty_like(input)


def _backward_fake(doutput: Tensor, input: Tensor, exact: bool = False) -> Tensor:
    return torch.empty_like(input)


_forward_op = register("gelu_forward(Tensor input, bool exact=False) -> Tensor", _forward, _forward_fake)
_backward_op = register(
    "gelu_backward(Tensor doutput, Tensor input, bool exact=False) -> Tensor", _backward, _backward_fake
)

# ---- Autograd


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, exact: bool) -> Tensor:
        ctx.save_for_backward(input)
        ctx.exact = exact
        return _forward_op(input, exact)

    @staticmethod
    def backward(ctx: Any, doutput: Tensor) -> tuple[Tensor | None, None]:
        return _Gelu.gradients(ctx, ctx.saved_tensors, doutput)

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Tensor, ...], doutput: Tensor) -> tuple[Tensor | None, None]:
        (input,) = saved
        if wants_definition(doutput):
            approximate = "none" if ctx.exact else "tanh"
            return double_backward(lambda x: reference.gelu(x, approximate), (input,), (doutput,), (True,))[0], None
        return _backward_op(doutput, input, ctx.exact), None


_gelu = applier(_Gelu)
differentiate("gelu_forward", _gelu)
_node = recorder(_Gelu, "gelu", "exact")
_whole = backend.whole_call("gelu")

# ---- Public


def _refusal(input: Tensor) -> str | None:
    """Why the kernels do not take this call; None if they do."""
    return None if input.dtype in KERNEL_DTYPES else f"input of dtype {input.dtype}"


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """The Gaussian error linear unit; drop-in for `torch.nn.functional.gelu` (arXiv:1606.08415).

    Args:
        input: any shape; the kernels take float32, bfloat16 and float16.
        approximate: "none" for x Phi(x), with Phi the normal distribution function; "tanh" for
            0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))). The kernels keep the value far from zero, where torch's
            float32 cancels or gives NaN.

    Raises:
        RuntimeError: `approximate` is another string.
        TypeError: input is not floating point of 16 bits or more, or not a dense tensor.
    """
    if not compiling() and (found := _whole(input=input, approximate=approximate)) is not None:
        return _node(input, approximate == "none") if found is True else found
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
    if input.dtype not in KERNEL_DTYPES:
        check_float("gelu", "input", input.dtype)
    exact = approximate == "none"
    if backend.choose("gelu", input.device, _refusal(input)) == "reference":
        return defined(reference.gelu, "gelu", {"input": input}, input, approximate)
    return _gelu(input, exact) if wants_grad(input) else _forward_op(input, exact)
