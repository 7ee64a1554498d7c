"""The registered ops behind layer_norm, rms_norm and their add_ forms: implementation and fake.

One pair of kernels serves all four: a residual is added in front where there is one, and RMS norm is the layer norm
that is not centred and has no bias. `weight_offset` is 1 for a zero-centred weight, else 0. The residual, and with it
the sum, `dsum` and `dinput`, has a dtype of its own, x's or float32. `seed` is None without dropout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchweld import backend
from torchweld.ops._register import register, settle

# ---- Implementation. The kernels see M rows of `cols` elements, whatever the shape; they fill what is allocated here.


_INPUT, _DOUTPUT = "[layer_norm] input", "[layer_norm] gradient of the output"
_NO_WORKSPACE = 4096  # columns up to which no forward kernel wants one, so that short calls need not ask


def _parameters(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Of x's dtype where both are, else float32, which holds the others exactly; contiguous."""
    dtype = x.dtype
    if (weight is not None and weight.dtype is not dtype) or (bias is not None and bias.dtype is not dtype):
        dtype = torch.float32
    # Asked here first, for to call `settle` costs 0.1 us.
    if weight is not None and not (weight.is_contiguous() and weight.dtype is dtype and not weight.is_neg()):
        weight = settle(weight, "[layer_norm] weight", dtype)
    if bias is not None and not (bias.is_contiguous() and bias.dtype is dtype and not bias.is_neg()):
        bias = settle(bias, "[layer_norm] bias", dtype)
    return weight, bias


def _run_forward(
    input: Tensor,
    residual: Tensor | None,
    cols: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    weight_offset: float,
    total: Tensor | None,
    stats: Tensor | None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    output, workspace = torch.empty_like(input), None
    weight, bias = _parameters(input, weight, bias)
    kernels = backend.kernels["cpu" if input.is_cpu else input.device.type]
    if cols > _NO_WORKSPACE and (
        size := kernels.layer_norm_forward_workspace(input.numel() // cols, cols, input.get_device())
    ):
        workspace = input.new_empty(size, dtype=torch.float32)
    kernels.layer_norm_forward(
        input,
        residual,
        cols,
        weight,
        bias,
        eps,
        centred,
        weight_offset,
        total,
        output,
        stats,
        dropout_p,
        seed,
        workspace,
    )
    return output


def _stats(x: Tensor, cols: int, centred: bool) -> Tensor:
    """Mean and rstd of each row, or rstd alone."""
    return x.new_empty(1 + centred, x.numel() // cols, dtype=torch.float32)  # sizes in a tuple cost 0.4 us


def _inference(
    input: Tensor,
    cols: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool = True,
    weight_offset: float = 0.0,
) -> Tensor:
    return _run_forward(
        input if input.is_contiguous() else settle(input, _INPUT),
        None,
        cols,
        weight,
        bias,
        eps,
        centred,
        weight_offset,
        None,
        None,
    )


def _forward(
    input: Tensor,
    cols: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool = True,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    stats = _stats(input, cols, centred)
    return _run_forward(
        settle(input, _INPUT), None, cols, weight, bias, eps, centred, weight_offset, None, stats
    ), stats


def _add_forward(
    x: Tensor,
    residual: Tensor,
    cols: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool = True,
    weight_offset: float = 0.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    x, residual, stats = settle(x, _INPUT), settle(residual, "[add_layer_norm] residual"), _stats(x, cols, centred)
    seed = None if seed is None else settle(seed, "[add_layer_norm] seed")
    total = torch.empty_like(residual)
    output = _run_forward(x, residual, cols, weight, bias, eps, centred, weight_offset, total, stats, dropout_p, seed)
    return output, total, stats


def _backward(
    doutput: Tensor,
    dsum: Tensor | None,
    input: Tensor,
    cols: int,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    mask: Sequence[bool],
    weight_offset: float = 0.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    doutput, x = settle(doutput, _DOUTPUT), settle(input, _INPUT)
    w, b = _parameters(doutput, weight, bias)
    seed = None if seed is None else settle(seed, "[add_layer_norm] seed")
    dinput = torch.empty_like(x) if mask[0] else None
    dx = torch.empty_like(doutput) if mask[1] else None
    dweight = torch.empty_like(w) if w is not None and mask[2] else None
    dbias = torch.empty_like(b) if b is not None and mask[3] else None
    kernels = backend.kernels[x.device.type]
    weights = dweight is not None or dbias is not None
    blocks = kernels.layer_norm_workspace(x.numel() // cols, cols, weights, x.get_device())
    kernels.layer_norm_backward(
        doutput,
        None if dsum is None else settle(dsum, _DOUTPUT),
        x,
        cols,
        w,
        stats.shape[0] == 2,
        weight_offset,
        settle(stats, "[layer_norm] statistics"),
        dinput,
        dx,
        dweight,
        dbias,
        x.new_empty((blocks, 2, cols), dtype=torch.float32) if blocks else None,
        dropout_p,
        seed,
    )
    return (
        x.new_empty(0) if dinput is None else dinput,
        x.new_empty(0) if dx is None else dx,
        x.new_empty(0) if dweight is None or weight is None else dweight.to(weight.dtype),
        x.new_empty(0) if dbias is None or bias is None else dbias.to(bias.dtype),
    )


# ---- Fake


def _inference_fake(input: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def _forward_fake(
    input: Tensor,
    cols: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool = True,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(input, memory_format=torch.contiguous_format), _stats(input, cols, centred)


def _add_forward_fake(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    output, stats = _forward_fake(x, *rest)
    return output, torch.empty_like(residual, memory_format=torch.contiguous_format), stats


def _backward_fake(
    doutput: Tensor,
    dsum: Tensor | None,
    input: Tensor,
    cols: int,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    mask: Sequence[bool],
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def like(t: Tensor | None, wanted: bool) -> Tensor:
        if t is None or not wanted:
            return input.new_empty(0)
        return torch.empty_like(t, memory_format=torch.contiguous_format)

    return like(input, mask[0]), like(doutput, mask[1]), like(weight, mask[2]), like(bias, mask[3])


inference_op = register(
    "layer_norm(Tensor input, SymInt cols, Tensor? weight, Tensor? bias, float eps, bool centred=True,"
    " float weight_offset=0.0) -> Tensor",
    _inference,
    _inference_fake,
)
forward_op = register(
    "layer_norm_forward(Tensor input, SymInt cols, Tensor? weight, Tensor? bias, float eps, bool centred=True,"
    " float weight_offset=0.0) -> (Tensor output, Tensor stats)",
    _forward,
    _forward_fake,
)
add_forward_op = register(
    "add_layer_norm_forward(Tensor x, Tensor residual, SymInt cols, Tensor? weight, Tensor? bias, float eps,"
    " bool centred=True, float weight_offset=0.0, float dropout_p=0.0, Tensor? seed=None)"
    " -> (Tensor output, Tensor sum, Tensor stats)",
    _add_forward,
    _add_forward_fake,
)
# dinput is the gradient of what was normalised, dx the same through the dropout and in doutput's dtype; `mask` says
# which of the four are wanted.
backward_op = register(
    "layer_norm_backward(Tensor doutput, Tensor? dsum, Tensor input, SymInt cols, Tensor? weight, Tensor? bias,"
    " Tensor stats, bool[4] mask, float weight_offset=0.0, float dropout_p=0.0, Tensor? seed=None)"
    " -> (Tensor dinput, Tensor dx, Tensor dweight, Tensor dbias)",
    _backward,
    _backward_fake,
)
