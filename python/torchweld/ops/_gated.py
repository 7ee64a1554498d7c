"""The registered ops behind swiglu and geglu: activation(gate) * up, of two tensors or of the halves of one.

`up` is None where gate is packed: its last dimension has the gate's columns in front, and up's behind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchweld import backend, reference
from torchweld.ops._arguments import KERNEL_DTYPES, check_dense, check_float, defined, recordable
from torchweld.ops._register import (
    applier,
    differentiate,
    double_backward,
    elsewhere,
    register,
    settle,
    wants_definition,
    wants_grad,
)

# ---- Implementation. The kernels see M rows of N columns.


def _rows(t: Tensor, cols: int, at: str) -> Tensor:
    """`t` as (M, cols): a view where its rows have one distance and its columns are neighbours."""
    count = t.numel() // cols if cols else 0
    if not t.is_contiguous() and (cols == 1 or t.stride(-1) == 1) and not t.is_neg():
        try:
            return t.view(count, cols)
        except RuntimeError:  # the distance varies
            pass
    return settle(t, at).view(count, cols)


def _cols(gate: Tensor, up: Tensor | None) -> int:
    if gate.dim() == 0:
        return 1
    return gate.shape[-1] if up is not None else gate.shape[-1] // 2


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gate and up by rows."""
    cols = _cols(gate, up)
    if up is not None:
        return _rows(gate, cols, "[gated] gate"), _rows(up, cols, "[gated] up")
    both = _rows(gate, 2 * cols, "[gated] gate")
    return both[:, :cols], both[:, cols:]


def _forward(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    output = _forward_fake(gate, up, activation)
    first, second = _halves(gate, up)
    backend.kernels[gate.device.type].gated_forward(gate=first, up=second, activation=activation, output=output)
    return output


def _backward(doutput: Tensor, gate: Tensor, up: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    dgate, dup = _backward_fake(doutput, gate, up, activation)
    first, second = _halves(gate, up)
    dfirst, dsecond = _halves(dgate, None if up is None else dup)
    doutput = settle(doutput, "[gated] gradient of the output")
    backend.kernels[gate.device.type].gated_backward(
        doutput=doutput, gate=first, up=second, activation=activation, dgate=dfirst, dup=dsecond
    )
    return dgate, dup


# ---- Fake


def _forward_fake(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    return gate.new_empty(gate.shape if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2))


def _backward_fake(doutput: Tensor, gate: Tensor, up: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty((0,) if up is None else up.shape)


_forward_op = register("gated_forward(Tensor gate, Tensor? up, str activation) -> Tensor", _forward, _forward_fake)
_backward_op = register(
    "gated_backward(Tensor doutput, Tensor gate, Tensor? up, str activation) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)

# ---- Autograd

_DEFINITIONS = {
    "silu": reference.swiglu,
    "gelu": reference.geglu,
    "gelu_tanh": lambda gate, up=None: reference.geglu(gate, up, approximate="tanh"),
}


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _forward_op(gate, up, activation)

    @staticmethod
    def backward(ctx: Any, doutput: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        gate, up = ctx.saved_tensors
        if wants_definition(doutput):
            needed = ctx.needs_input_grad[:2]
            dgate, dup = double_backward(_DEFINITIONS[ctx.activation], (gate, up), (doutput,), needed)
            return dgate, dup, None
        dgate, dup = _backward_op(doutput, gate, up, ctx.activation)
        return dgate, None if up is None else dup, None


_gated = applier(_Gated)
differentiate("gated_forward", _gated)

# ---- What the public functions share


def _refusal(op: str, gate: Tensor, up: Tensor | None) -> str | None:
    """Raises on arguments that no backend takes; returns why the kernels do not take these, None if they do."""
    check_dense(op, gate=gate, **({} if up is None else {"up": up}))
    check_float(op, "gate", gate.dtype)
    if up is None:
        if gate.dim() == 0 or gate.shape[-1] % 2:
            expected = "an even last dimension, or up as a tensor of its own"
            raise RuntimeError(f"[{op}] gate: expected {expected}, but got shape {list(gate.shape)}")
    else:
        check_float(op, "up", up.dtype)
        if up.shape != gate.shape:
            raise RuntimeError(f"[{op}] up: expected gate's shape {list(gate.shape)}, but got {list(up.shape)}")
        if up.device != gate.device:
            raise RuntimeError(f"[{op}] up: expected gate's device {gate.device}, but got {up.device}")
        if up.dtype is not gate.dtype:
            return f"up of dtype {up.dtype} beside gate of dtype {gate.dtype}"
    return None if gate.dtype in KERNEL_DTYPES else f"gate of dtype {gate.dtype}"


def gated(public: Any, gate: Tensor, up: Tensor | None, activation: str, **options: Any) -> Tensor:
    """What the public function of that name returns; `options` are those of its definition."""
    op = public.__name__
    if theirs := elsewhere(public, None, ("gate", "up"), gate, up):
        return theirs(gate, up, **options)
    refusal = _refusal(op, gate, up)  # also says that None is no gate
    if backend.choose(op, gate.device, refusal) == "reference":
        return defined(getattr(reference, op), op, {"gate": gate, "up": up}, gate, up, **options)
    if wants_grad(gate, up):
        return _gated(recordable(gate), recordable(up), activation)
    return _forward_op(gate, up, activation)
