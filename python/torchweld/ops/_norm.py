"""The registered ops behind layer_norm, rms_norm and their add_ forms: implementation and fake.

One pair of kernels serves all four. A residual is added in front where there is one. RMS norm is the layer norm that is
not centred and has no bias. The residual, its sum with x, `dsum` and `dinput` have a dtype of their own: x's, or
float32. `seed` is None without dropout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchweld import backend
from torchweld.ops._register import register, settle


class Norm(NamedTuple):
    """The numbers of a norm. The kernels see rows of `cols` elements, whatever the shape."""

    cols: int
    eps: float
    centred: bool = True
    weight_offset: float = 0.0  # 1 for a zero-centred weight
    dropout_p: float = 0.0


_new = tuple.__new__


def norm_of(
    cols: int, eps: float, centred: bool = True, weight_offset: float | None = None, dropout_p: float | None = None
) -> Norm:
    """`Norm(...)`, 0.4 us faster than the constructor of a NamedTuple: a small norm takes 6 us in all.

    None is 0. A float that is a default would be a variable of a graph that is compiled with dynamic=True, and of the
    first norm's part of it: Dynamo then fails at the second norm.
    """
    return _new(Norm, (cols, eps, centred, weight_offset or 0.0, dropout_p or 0.0))


# ---- Implementation. The kernels fill what is allocated here.


_INPUT, _DOUTPUT = "[layer_norm] input", "[layer_norm] gradient of the output"
_WEIGHT, _BIAS = "[layer_norm] weight", "[layer_norm] bias"
_NO_WORKSPACE = 4096  # columns up to which no forward kernel needs a workspace, so that short calls need not ask


def _parameters(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias as the kernels read them: contiguous, both in x's dtype or both in float32, which is exact."""
    dtype = x.dtype
    if (weight is not None and weight.dtype is not dtype) or (bias is not None and bias.dtype is not dtype):
        dtype = torch.float32
        weight = None if weight is None else settle(weight, _WEIGHT, dtype)
        return weight, None if bias is None else settle(bias, _BIAS, dtype)
    # A call of `settle` costs 0.1 us.
    if weight is not None and not (weight.is_contiguous() and not weight.is_neg()):
        weight = settle(weight, _WEIGHT)
    if bias is not None and not (bias.is_contiguous() and not bias.is_neg()):
        bias = settle(bias, _BIAS)
    return weight, bias


def _run_forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: Norm,
    stats: Tensor | None = None,
    residual: Tensor | None = None,
    total: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    if not input.is_contiguous():  # never lazily negated: `register` checks its first argument
        input = settle(input, _INPUT)
    output, workspace, cols = torch.empty_like(input), None, norm.cols
    weight, bias = _parameters(input, weight, bias)
    kernels = backend.kernels["cpu" if input.is_cpu else input.device.type]
    if cols > _NO_WORKSPACE and (
        size := kernels.layer_norm_forward_workspace(input.numel() // cols, cols, input.get_device())
    ):
        workspace = input.new_empty(size, dtype=torch.float32)
    kernels.layer_norm_forward(
        input=input,
        residual=residual,
        weight=weight,
        bias=bias,
        seed=seed,
        norm=norm,
        sum=total,
        output=output,
        stats=stats,
        workspace=workspace,
    )
    return output


def _stats(x: Tensor, norm: Norm) -> Tensor:
    """Mean and rstd of each row, or rstd alone."""
    return x.new_empty(1 + norm.centred, x.numel() // norm.cols, dtype=torch.float32)  # sizes in a tuple cost 0.4 us


def _forward(input: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    stats = _stats(input, norm)
    return _run_forward(input, weight, bias, norm, stats), stats


def _add_forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None, norm: Norm
) -> tuple[Tensor, Tensor, Tensor]:
    residual, stats = settle(residual, "[add_layer_norm] residual"), _stats(x, norm)
    seed = None if seed is None else settle(seed, "[add_layer_norm] seed")
    total = torch.empty_like(residual)
    output = _run_forward(x, weight, bias, norm, stats, residual=residual, total=total, seed=seed)
    return output, total, stats


def _backward(
    doutput: Tensor,
    dsum: Tensor | None,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    seed: Tensor | None,
    mask: Sequence[bool],
    norm: Norm,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    doutput, x = settle(doutput, _DOUTPUT), settle(input, _INPUT)
    w, b = _parameters(doutput, weight, bias)
    dinput = torch.empty_like(x) if mask[0] else None
    dx = torch.empty_like(doutput) if mask[1] else None
    dweight = torch.empty_like(w) if w is not None and mask[2] else None
    dbias = torch.empty_like(b) if b is not None and mask[3] else None
    kernels = backend.kernels[x.device.type]
    weights = dweight is not None or dbias is not None
    blocks = kernels.layer_norm_workspace(x.numel() // norm.cols, norm.cols, weights, x.get_device())
    kernels.layer_norm_backward(
        doutput=doutput,
        dsum=None if dsum is None else settle(dsum, _DOUTPUT),
        input=x,
        weight=w,
        stats=settle(stats, "[layer_norm] statistics"),
        seed=None if seed is None else settle(seed, "[add_layer_norm] seed"),
        norm=norm,
        dinput=dinput,
        dx=dx,
        dweight=dweight,
        dbias=dbias,
        partial=x.new_empty((blocks, 2, norm.cols), dtype=torch.float32) if blocks else None,
    )
    return (
        x.new_empty(0) if dinput is None else dinput,
        x.new_empty(0) if dx is None else dx,
        x.new_empty(0) if dweight is None or weight is None else dweight.to(weight.dtype),
        x.new_empty(0) if dbias is None or bias is None else dbias.to(bias.dtype),
    )


# ---- Fake


def _inference_fake(input: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Norm) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def _forward_fake(input: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    return torch.empty_like(input, memory_format=torch.contiguous_format), _stats(input, norm)


def _add_forward_fake(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None, norm: Norm
) -> tuple[Tensor, Tensor, Tensor]:
    output, stats = _forward_fake(x, weight, bias, norm)
    return output, torch.empty_like(residual, memory_format=torch.contiguous_format), stats


def _backward_fake(
    doutput: Tensor,
    dsum: Tensor | None,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    seed: Tensor | None,
    mask: Sequence[bool],
    norm: Norm,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def like(t: Tensor | None, wanted: bool) -> Tensor:
        if t is None or not wanted:
            return input.new_empty(0)
        return torch.empty_like(t, memory_format=torch.contiguous_format)

    return like(input, mask[0]), like(doutput, mask[1]), like(weight, mask[2]), like(bias, mask[3])


# ---- Registration

inference_op = register(
    "layer_norm(Tensor input, Tensor? weight, Tensor? bias, Norm norm) -> Tensor", _run_forward, _inference_fake, Norm
)
forward_op = register(
    "layer_norm_forward(Tensor input, Tensor? weight, Tensor? bias, Norm norm) -> (Tensor output, Tensor stats)",
    _forward,
    _forward_fake,
    Norm,
)
add_forward_op = register(
    "add_layer_norm_forward(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor? seed, Norm norm)"
    " -> (Tensor output, Tensor sum, Tensor stats)",
    _add_forward,
    _add_forward_fake,
    Norm,
)
# dinput is the gradient of what was normalised, dx the same through the dropout and in doutput's dtype; `mask` says
# which of the four are wanted.
backward_op = register(
    "layer_norm_backward(Tensor doutput, Tensor? dsum, Tensor input, Tensor? weight, Tensor? bias, Tensor stats,"
    " Tensor? seed, bool[4] mask, Norm norm) -> (Tensor dinput, Tensor dx, Tensor dweight, Tensor dbias)",
    _backward,
    _backward_fake,
    Norm,
)
