"""dropout: the mask is made from a seed, in the backward again."""

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
    check_seed,
    defined,
    flag,
    number,
)
from torchweld.ops._register import applier, differentiate, elsewhere, register, settle, wants_definition, wants_grad
from torchweld.reference.philox import draw_seed

_twin = torch.nn.functional.dropout  # a program may replace it by the function below

# ---- Implementation. As in torch the output has the layout of the input; which elements are dropped has not.


def _dropout_kernel(input: Tensor, seed: Tensor, p: float) -> Tensor:
    x = settle(input, "[dropout] input")
    output = torch.empty_like(x)
    backend.kernels[x.device.type].dropout(input=x, seed=settle(seed, "[dropout] seed"), p=p, output=output)
    return output if input.is_contiguous() else torch.empty_like(input).copy_(output)


# ---- Fake


def _dropout_fake(input: Tensor, seed: Tensor, p: float) -> Tensor:
    return torch.empty_like(input)


_dropout_op = register("dropout(Tensor input, Tensor seed, float p) -> Tensor", _dropout_kernel, _dropout_fake)

# ---- Autograd


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, seed: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.p = p
        return _dropout_op(input, seed, p)

    @staticmethod
    def backward(ctx: Any, doutput: Tensor) -> tuple[Tensor, None, None]:
        (seed,) = ctx.saved_tensors
        if wants_definition(doutput):
            return reference.dropout(doutput, ctx.p, seed=seed), None, None
        return _dropout_op(doutput, seed, ctx.p), None, None


_dropout = applier(_Dropout)
differentiate("dropout", _dropout)

# ---- Public

# From so many elements and columns on, forward and backward take less time than torch's. A row costs a batch of words.
_PAYS, _COLUMNS = 2048, 8


def pays(input: Tensor) -> bool:
    """Whether the kernels serve `input`, and forward and backward take less time than torch's."""
    if input.dtype not in KERNEL_DTYPES or input.is_nested or input.device.type not in backend.kernels:
        return False
    return torch.compiler.is_compiling() or (input.numel() >= _PAYS and input.shape[-1] >= _COLUMNS)


def _refusal(input: Tensor) -> str | None:
    """Why the kernels do not take this call; None if they do."""
    return None if input.dtype in KERNEL_DTYPES else f"input of dtype {input.dtype}"


def dropout(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, seed: Tensor | None = None
) -> Tensor:
    """Dropout; drop-in for `torch.nn.functional.dropout` (Srivastava et al., JMLR 15, 2014).

    The backward makes the mask again from the seed: no mask is kept. The mask is another than torch's.

    Args:
        input: any shape; the kernels take float32, bfloat16 and float16.
        p: probability that an element is dropped: multiplied by 0, so that NaN stays and infinity becomes NaN. The
            others are divided by 1 - p.
        training: False returns the input itself, as p = 0 does.
        inplace: the input itself is overwritten, and returned; the result lies in memory of its own for that time.
        seed: int64 of one element on input's device. It decides which elements are dropped (Philox by row and column,
            rows along the last dimension: the same on every backend, and as `add_layer_norm` drops with this seed).
            None: a seed from torch's default generator.

    Raises:
        RuntimeError: seed is not one int64 element on input's device; inplace for a leaf that requires a gradient.
        TypeError: input is not floating point of 16 bits or more, or an argument is of another type.
        ValueError: p is not a probability.
    """
    if flag("dropout", "inplace", inplace):
        output = dropout(input, p, training, seed=seed)
        return input if output is input else input.copy_(output)
    p, training = number("dropout", "p", p), flag("dropout", "training", training)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"[dropout] p: expected a probability from 0 to 1, but got {p}")
    if theirs := elsewhere(dropout, _twin if seed is None else None, ("input", "seed"), input, seed):
        return theirs(input, p, training) if seed is None else theirs(input, p, training, seed=seed)
    try:
        check_dense("dropout", input=input, **({} if seed is None else {"seed": seed}))
    except NotDenseError as error:
        if seed is not None:
            raise
        return as_torch_does(error, _twin, input, p, training)
    if seed is not None:
        check_seed("dropout", seed, input.device)
    # Where a graph is made, the number of elements may not be known.
    if not training or p == 0 or (not torch.compiler.is_compiling() and input.numel() == 0):
        return input
    if input.dtype not in KERNEL_DTYPES:
        check_float("dropout", "input", input.dtype)
    seed = draw_seed(input.device) if seed is None else seed
    if backend.choose("dropout", input.device, _refusal(input)) == "reference":
        return defined(reference.dropout, "dropout", {"input": input, "seed": seed}, input, p, seed=seed)
    return _dropout(input, seed, p) if wants_grad(input) else _dropout_op(input, seed, p)
