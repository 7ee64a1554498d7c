"""layer_norm, plain and with a residual add in front."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    integer,
    number,
    shown,
)
from torchweld.ops._norm import add_forward_op, inference_op, norm_of
from torchweld.ops._norm_autograd import add_layer_norm_function, layer_norm_function, layer_norm_node
from torchweld.ops._register import compiling, elsewhere, float32_under_autocast, wants_grad
from torchweld.reference.philox import draw_seed

_twin = torch.nn.functional.layer_norm
_STRIDED = torch.strided
_whole = backend.whole_call("layer_norm")


def sizes(op: str, shape: Sequence[int]) -> tuple[int, ...]:
    """`normalized_shape` as a tuple of Python's integers, as it nearly always is."""
    if type(shape) is tuple and len(shape) == 1 and type(shape[0]) is int:
        return shape
    expected = "a tuple of integers"
    if not isinstance(shape, (tuple, list)):
        remedy = f"; write ({shape},)" if isinstance(shape, int) else ""
        raise TypeError(f"[{op}] normalized_shape: expected {expected}, but got {shown(shape)}{remedy}")
    if len(shape) == 0:
        raise RuntimeError(f"[{op}] normalized_shape: expected at least one dimension, but got {shown(shape)}")
    return tuple(integer(op, "normalized_shape", n, expected) for n in shape)


def _first(op: str) -> str:
    return "x" if op.startswith("add_") else "input"


def refusal_of(op: str, x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None) -> str | None:
    """Raises on arguments that no backend takes; returns why the kernels do not take these, None if they do."""
    if x.layout is not _STRIDED:
        check_dense(op, **{_first(op): x})
    try:
        own, dtype = x.shape, x.dtype
    except RuntimeError:  # a nested tensor has no such shape
        check_dense(op, **{_first(op): x})
        raise
    # A slice costs 0.2 us.
    if not (len(shape) == 1 and len(own) > 0 and own[-1] == shape[0]) and own[-len(shape) :] != shape:
        expected = f"a shape that ends in normalized_shape {list(shape)}"
        raise RuntimeError(f"[{op}] {_first(op)}: expected {expected}, but got {list(own)}")
    # torch's rms_norm is a composition of operators that take more dtypes.
    if dtype not in KERNEL_DTYPES and not (op.endswith("rms_norm") and dtype.is_complex):
        check_float(op, _first(op), dtype)
    for p in (weight, bias):
        if p is None:
            continue
        if p.layout is not _STRIDED:  # the reference's product with a sparse one would be sparse
            check_dense(op, **{"weight" if p is weight else "bias": p})
        try:
            fits = p.shape == shape
        except RuntimeError:
            check_dense(op, **{"weight" if p is weight else "bias": p})
            raise
        if not fits:
            name = "weight" if p is weight else "bias"
            raise RuntimeError(f"[{op}] {name}: expected shape {list(shape)}, but got {list(p.shape)}")
        if p.dtype is not dtype and p.dtype not in KERNEL_DTYPES:
            if not op.endswith("rms_norm"):
                check_float(op, "weight" if p is weight else "bias", p.dtype)
            return f"a parameter of dtype {p.dtype}"
    if dtype not in KERNEL_DTYPES:
        return f"input of dtype {dtype}"
    return "rows without elements" if 0 in shape else None


def residual_refusal(op: str, x: Tensor, residual: Tensor, dropout_p: float, seed: Tensor | None) -> str | None:
    """The same for the residual and the dropout of an add_ form."""
    check_dense(op, x=x, residual=residual, **({} if seed is None else {"seed": seed}))
    if residual.shape != x.shape:
        raise RuntimeError(f"[{op}] residual: expected x's shape {list(x.shape)}, but got {list(residual.shape)}")
    if residual.device != x.device:
        raise RuntimeError(f"[{op}] residual: expected x's device {x.device}, but got {residual.device}")
    check_float(op, "residual", residual.dtype)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"[{op}] dropout_p: expected a probability from 0 to 1, but got {dropout_p}")
    if seed is not None:
        check_seed(op, seed, x.device)
    if residual.dtype not in (x.dtype, torch.float32):
        return f"a residual of dtype {residual.dtype} beside x of dtype {x.dtype}"
    return None


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer norm over the trailing `normalized_shape`; drop-in for `torch.nn.functional.layer_norm`.

    y = (input - mean) / sqrt(variance + eps) * weight + bias (Ba, Kiros, Hinton: arXiv:1607.06450). Statistics are
    float32, the output has input's dtype. Weight and bias may have another floating dtype than the input.

    Args:
        input: (*, *normalized_shape), float32, bfloat16 or float16 (others run on the reference).
        normalized_shape: the trailing dimensions to normalise over.
        weight, bias: normalized_shape, or None.
        eps: added to the variance.

    Raises:
        RuntimeError: a shape does not fit.
        TypeError: input, weight or bias is not floating point of 16 bits or more, or an argument is of another type.
        ValueError: weight or bias is on another device than input.
    """
    if not compiling():
        found = _whole(input=input, normalized_shape=normalized_shape, weight=weight, bias=bias, eps=eps)
        if found is True:
            return layer_norm_node(input, weight, bias, norm_of(normalized_shape[0], eps))
        if found is not None:
            return found
    shape = sizes("layer_norm", normalized_shape)
    if type(eps) is not float:
        eps = number("layer_norm", "eps", eps)
    if theirs := elsewhere(layer_norm, _twin, ("input", "weight", "bias"), input, weight, bias):
        return theirs(input, normalized_shape, weight, bias, eps)
    if input is None:
        check_dense("layer_norm", input=input)
    if input.is_cuda:  # as torch's norms do on a GPU; on the CPU they keep their dtype
        input, weight, bias = float32_under_autocast(input, weight, bias)
    try:
        refusal = refusal_of("layer_norm", input, shape, weight, bias)
        if backend.choose("layer_norm", input.device, refusal) == "reference":
            tensors = {"input": input, "weight": weight, "bias": bias}
            return defined(reference.layer_norm, "layer_norm", tensors, input, shape, weight, bias, eps)
        norm = norm_of(math.prod(shape), eps)
        if wants_grad(input, weight, bias):
            return layer_norm_function(input, weight, bias, norm)
        return inference_op(input, weight, bias, norm)
    except NotDenseError as error:
        if 0 in shape:  # torch's kernel for nested tensors divides by it
            raise
        return as_torch_does(error, _twin, input, normalized_shape, weight, bias, eps)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    *,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Dropout, residual add and layer norm in one pass.

    new_residual = residual + dropout(x, dropout_p), normed = layer_norm(new_residual). The backward makes the dropout
    mask again from its seed.

    Args:
        x: (*, *normalized_shape), as `layer_norm`'s input.
        residual: of x's shape and device, in x's dtype or in float32 (other dtypes run on the reference). In float32 a
            residual stream loses nothing to the rounding of bfloat16 activations.
        normalized_shape, weight, bias, eps: as in `layer_norm`.
        dropout_p: probability that an element of x is dropped; the others are divided by 1 - dropout_p. Pass 0 when
            not training.
        seed: int64 of one element on x's device. It decides which elements are dropped (Philox by row and column: the
            same on every backend). None: a seed from torch's default generator.

    Returns:
        (normed, new_residual): normed in x's dtype, new_residual in residual's dtype. new_residual is rounded before
        the norm.

    Raises:
        RuntimeError, TypeError: as in `layer_norm`; also when x and residual differ in shape or device.
        ValueError: dropout_p is not a probability.
    """
    op, names = "add_layer_norm", ("x", "residual", "weight", "bias", "seed")
    shape, eps, dropout_p = sizes(op, normalized_shape), number(op, "eps", eps), number(op, "dropout_p", dropout_p)
    if theirs := elsewhere(add_layer_norm, None, names, x, residual, weight, bias, seed):
        return theirs(x, residual, shape, weight, bias, eps, dropout_p, seed=seed)
    refusal = residual_refusal(op, x, residual, dropout_p, seed)
    refusal = refusal_of(op, x, shape, weight, bias) or refusal
    seed = (draw_seed(x.device) if seed is None else seed) if dropout_p > 0 else None
    if backend.choose(op, x.device, refusal) == "reference":
        tensors = dict(zip(names, (x, residual, weight, bias, seed), strict=True))
        definition = reference.add_layer_norm
        return defined(definition, op, tensors, x, residual, shape, weight, bias, eps, dropout_p, seed=seed)
    norm = norm_of(math.prod(shape), eps, dropout_p=dropout_p)
    if wants_grad(x, residual, weight, bias):
        return add_layer_norm_function(x, residual, weight, bias, seed, norm)
    return add_forward_op(x, residual, weight, bias, seed, norm)[:2]
