"""Rotary embeddings of Hugging Face transformers on the kernels.

A model's attention calls a function of its module, apply_rotary_pos_emb. The attention of a patched model gets a
forward of the same code whose globals have ours under that name: other models, and the module, see nothing of it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor

from torchweld import ops

_NAME, _ROTATE = "apply_rotary_pos_emb", "rotate_half"


@dataclass(frozen=True)
class _Form:
    """`partial`: cos may have fewer columns than a head; `casts`: the result has query's dtype, whatever cos has.

    `halved`: the second half of cos is not read, and its columns belong to neighbours.
    """

    interleaved: bool = False
    partial: bool = False
    casts: bool = False
    halved: bool = False


# By a model that has it.
_FORMS = {
    "llama": _Form(),
    "gpt_neox": _Form(partial=True),
    "phi3": _Form(partial=True),
    "modernbert": _Form(casts=True),
    "olmo2": _Form(casts=True),
    "cohere": _Form(interleaved=True, casts=True),
    "glm": _Form(interleaved=True, partial=True, halved=True),
}


def _body(function: Any) -> Any:
    """What a function does: its instructions, and the names and constants in them, but for its documentation."""
    if type(function) is not FunctionType:
        return None
    code = function.__code__
    constants = [c for c in code.co_consts if c != function.__doc__]
    return code.co_code, code.co_names, code.co_varnames, tuple(map(repr, constants)), function.__defaults__


def _bodies(function: Any) -> Any:
    if type(function) is not FunctionType or _ROTATE not in function.__globals__:
        return None
    return _body(function), _body(function.__globals__[_ROTATE])


@cache
def _forms() -> list[tuple[Any, _Form]]:
    found = []
    for model, form in _FORMS.items():
        try:
            module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
        except ImportError:  # this version has it not
            continue
        if (bodies := _bodies(getattr(module, _NAME, None))) is not None:
            found.append((bodies, form))
    return found


def _form(function: Any) -> _Form | None:
    bodies = _bodies(function)
    return None if bodies is None else next((form for known, form in _forms() if known == bodies), None)


def _serves(form: _Form, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int) -> bool:
    """Whether the op gives what the function gives: shape, dtype and all."""
    if any(not isinstance(t, Tensor) for t in (q, k, cos, sin)) or unsqueeze_dim not in (1, 2):
        return False
    if not (q.dim() == k.dim() == 4 and cos.dim() == 3 and sin.shape == cos.shape and q.dtype is k.dtype):
        return False
    if cos.dtype is not sin.dtype or not (form.casts or cos.dtype is q.dtype):
        return False
    size, tokens = cos.shape[-1], q.shape[3 - unsqueeze_dim]
    fits = 2 <= size <= q.shape[-1] and size % 2 == 0 and (form.partial or size == q.shape[-1])
    heads = unsqueeze_dim
    alike = all(a == b for d, (a, b) in enumerate(zip(q.shape, k.shape, strict=True)) if d != heads)
    return fits and alike and cos.shape[1] == tokens and cos.shape[0] in (1, q.shape[0])


def _ours(stock: Callable[..., Any], form: _Form) -> Callable[..., Any]:
    @wraps(stock)
    def apply(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        if not _serves(form, q, k, cos, sin, unsqueeze_dim):
            return stock(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        size = cos.shape[-1]
        if form.halved:
            cos, sin = cos[..., : size // 2], sin[..., : size // 2]
        seq_dim = -2 if unsqueeze_dim == 1 else -3
        return ops.rotary_embedding(q, k, cos, sin, interleaved=form.interleaved, rotary_dim=size, seq_dim=seq_dim)

    return apply


class _Globals(dict[str, Any]):
    """A module's globals, as they are at any time, but for some names."""

    def __init__(self, of: dict[str, Any], **own: Any) -> None:
        super().__init__(own)
        self._of = of

    def __missing__(self, name: str) -> Any:
        return self._of[name]


def _rebound(function: Any, outer: tuple[Any, ...] = ()) -> FunctionType | None:
    """The function with ours in the place of the rotary function; None if it calls none that is known.

    Also of one that a decorator holds in its closure, where `outer` are the functions around it.
    """
    if type(function) is not FunctionType or function in outer:
        return None
    names, cells = function.__globals__, list(function.__closure__ or ())
    if _NAME in function.__code__.co_names:
        stock = names.get(_NAME)
        form = _form(stock)
        if form is None or stock is None:
            return None
        names = _Globals(names, **{_NAME: _ours(stock, form)})
    else:
        inner = {
            i: new for i, cell in enumerate(cells) if (new := _rebound(_content(cell), (*outer, function))) is not None
        }
        if not inner:
            return None
        cells = [CellType(inner[i]) if i in inner else cell for i, cell in enumerate(cells)]
    new = FunctionType(function.__code__, names, function.__name__, function.__defaults__, tuple(cells))
    new.__kwdefaults__ = function.__kwdefaults__
    new.__qualname__, new.__doc__ = function.__qualname__, function.__doc__
    new.__annotations__, new.__module__ = function.__annotations__, function.__module__
    return new


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing in it yet
        return None


def on_the_kernels(cls: Any) -> Callable[..., Any] | None:
    """The forward of a class with rotary embeddings of ours; None if it calls no rotary function that is known.

    Under torch.compile the class's own: Dynamo looks a function's globals up in its module.
    """
    stock = getattr(cls, "forward", None)
    ours = _rebound(stock)
    if ours is None or stock is None:
        return None

    @wraps(stock)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return stock(*args, **kwargs) if torch.compiler.is_compiling() else ours(*args, **kwargs)

    return forward
