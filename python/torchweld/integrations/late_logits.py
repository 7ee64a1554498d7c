"""Logits that are made when something reads them, and losses that need none.

A `LateLogits` stands for the result of an output layer. To torch it is a tensor of that shape, dtype and device, with a
node of autograd. What the losses of language models do with logits (casts, reshapes, a softcap) makes other late ones;
`torch.nn.functional.cross_entropy` becomes `ops.linear_cross_entropy`. Whatever else reads the values gets the logits
of the forward, with their gradients, whenever and in whatever mode it reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from torchweld import ops
from torchweld._torch import no_torch_function
from torchweld.integrations.output_layer import LayerCall, Loss, Made, Op, Product, Read, Recipe, Watch
from torchweld.ops._register import under_autocast

# ---- The tensor


class LateLogits(Tensor):
    """Logits that are made when something reads their values."""

    _recipe: Recipe
    _watch: Watch
    _before: tuple[LateLogits, ...]  # what these logits come from
    _made: Tensor | None

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> LateLogits:
        """The logits of an output layer, whose product has this dtype."""
        _watch_optimizers()
        call = LayerCall(Product(hidden, weight, bias), dtype)
        return LateLogits._from(Recipe(call, hidden, dtype), ())

    @staticmethod
    def _from(recipe: Recipe, before: tuple[LateLogits, ...]) -> LateLogits:
        late: LateLogits = Made.apply(*recipe.call.product, recipe, LateLogits)
        late._recipe, late._watch, late._before, late._made = recipe, Watch(), before, None
        _unread[id(late)] = late
        return late

    def made(self) -> Tensor:
        """The logits, from now on kept: the same for reads in any mode, with autograd if the forward had it."""
        if self._made is None:
            with torch.inference_mode(False), torch.enable_grad():
                self._made = Read.apply(self, self._recipe)
            _unread.pop(id(self), None)
        return self._made

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are plain tensors."""
        return self.made().__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """A function that needs no logits is answered; for any other they are made."""
        kwargs, first, name = kwargs or {}, args[0] if args else None, getattr(func, "__name__", "")
        if func in _OF_AUTOGRAD or getattr(func, "__self__", None) in _PROPERTIES_OF_AUTOGRAD:
            _note_watches(func, args, kwargs)
            with no_torch_function():
                return func(*args, **kwargs)
        rule = _PROPERTIES.get(func) if name == "__get__" else _RULES.get(name)
        plain = not kwargs or rule is _loss  # no other rule knows options by name, as in size(dim=1)
        if rule is not None and plain and isinstance(first, LateLogits) and first._made is None:
            found = rule(first, *args[1:], **kwargs)
            if isinstance(found, Recipe):
                trail = (*found.trail, Op(func, args[1:]))
                return LateLogits._from(replace(found, trail=trail), (*first._before, first))
            if found is not NotImplemented:
                return found
        return func(*_now(args), **_now(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Below autograd, where torch's own code in C++ reads the values."""
        return func(*_values(args), **_values(kwargs or {}))


def _now(value: Any) -> Any:
    """`value` with all late logits in it made."""
    return _replaced(value, LateLogits.made)


def _values(value: Any) -> Any:
    return _replaced(value, lambda late: late.made().detach())


def _replaced(value: Any, function: Callable[[LateLogits], Tensor]) -> Any:
    if isinstance(value, LateLogits):
        with no_torch_function():
            return function(value)
    if isinstance(value, dict):
        return {k: _replaced(v, function) for k, v in value.items()}
    return type(value)(_replaced(v, function) for v in value) if type(value) in (tuple, list) else value


# ---- Before an optimizer writes to the parameters of an output layer, logits that may yet be read keep the values.

_unread: WeakValueDictionary[int, LateLogits] = WeakValueDictionary()


@cache
def _watch_optimizers() -> None:
    register_optimizer_step_pre_hook(_keep_parameters)


def _keep_parameters(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling() or not _unread:
        return
    written = {id(p) for group in optimizer.param_groups for p in group["params"]}
    copies: dict[int, Tensor] = {}  # one of a parameter serves all logits of its layer
    for call in {late._recipe.call for late in list(_unread.values())}:
        if any(id(p) in written for p in call.product[1:]):
            call.keep(copies)


# ---- Functions that concern autograd alone: late logits are a tensor of its graph.

_OF_AUTOGRAD = {Tensor.register_hook, Tensor.retain_grad, torch.autograd.grad, torch.autograd.backward}
_PROPERTIES_OF_AUTOGRAD = {Tensor.requires_grad, Tensor.is_leaf, Tensor.grad_fn, Tensor.grad, Tensor.retains_grad}


def _note_watches(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Notes which logits are to have the gradient of a loss that needs none of them."""
    if func is Tensor.retain_grad or (func is Tensor.register_hook and not _only_tells(args[1])):
        args[0]._watch.wanted = True
    elif func in (torch.autograd.grad, torch.autograd.backward):
        inputs = kwargs.get("inputs", args[1] if func is torch.autograd.grad and len(args) > 1 else ())
        for t in (inputs,) if isinstance(inputs, Tensor) else inputs or ():
            if isinstance(t, LateLogits):
                t._watch.wanted = True


def _only_tells(hook: Any) -> bool:
    """Whether a hook is FSDP's on the outputs of a module: it tells that a backward begins, as the loss's does."""
    return str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith("torch.distributed.")


# ---- What needs no logits, by the names of torch's functions. NotImplemented: they are needed after all.


def _cast(late: LateLogits, *args: Any) -> Any:
    dtype = args[0] if len(args) == 1 else None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return NotImplemented
    return replace(late._recipe, dtype=dtype)


def _reshape(late: LateLogits, *shape: Any) -> Any:
    rows = late._recipe.rows
    sizes = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    if len(sizes) < 2 or sizes[-1] != late._recipe.shape[-1] or not all(isinstance(n, int) for n in sizes):
        return NotImplemented
    return replace(late._recipe, rows=rows.reshape(*sizes[:-1], rows.shape[-1]))


def _index(late: LateLogits, index: Any) -> Any:
    """logits[..., a:b, :]: all classes of some positions."""
    rows, parts = late._recipe.rows, index if isinstance(index, tuple) else (index,)
    if not all(part is Ellipsis or isinstance(part, (slice, int)) for part in parts):
        return NotImplemented
    reaches_classes = Ellipsis in parts or len(parts) >= rows.dim()
    if reaches_classes and parts[-1] != slice(None):
        return NotImplemented
    return replace(late._recipe, rows=rows[index])


def _step(number: int) -> Callable[..., Any]:
    """One of the three operations of a softcap, in their order."""

    def rule(late: LateLogits, *args: Any) -> Any:
        recipe = late._recipe
        cap = recipe.cap
        if number == 0 and len(args) == 1 and isinstance(args[0], (int, float)) and args[0] > 0:
            cap = float(args[0])
        fits = len(args) == (number != 1) and (number != 2 or args[0] == cap) and cap > 0
        return replace(recipe, cap=cap, steps=number + 1) if fits and recipe.steps == number else NotImplemented

    return rule


def _loss(
    late: LateLogits,
    target: Any,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    recipe = late._recipe
    x, layer = recipe.rows, recipe.call.product
    common = isinstance(target, Tensor) and target.dtype is torch.int64 and target.dim() == x.dim() - 1 == 1
    if not common or not (weight is size_average is reduce is None) or recipe.steps not in (0, 3):
        return NotImplemented
    if recipe.call.apart or not recipe.call.is_unchanged():
        return NotImplemented
    options: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": reduction}
    # The product has the dtype of the forward. The loss is float32 of 16 bits under autocast, and of a cast to it.
    wide = recipe.dtype is torch.float32 or (recipe.dtype in _HALVES and under_autocast(x))
    half = recipe.call.dtype if recipe.call.dtype in _HALVES else None
    mixed = wide or not x.dtype is layer.weight.dtype is half
    with torch.autocast(x.device.type, half, enabled=half is not None and mixed):
        cap = recipe.cap if recipe.steps else None
        loss = ops.linear_cross_entropy(x, layer.weight, target, layer.bias, softcap=cap, **options)
    loss = loss.to(torch.float32 if wide else recipe.dtype)
    if not loss.requires_grad:
        return loss
    line = (*late._before, late)
    return Loss.apply(loss, target, options, recipe, [each._watch for each in line], *line)


_HALVES = (torch.bfloat16, torch.float16)
_RULES: dict[str, Callable[..., Any]] = {
    "float": lambda late: replace(late._recipe, dtype=torch.float32),
    "to": _cast,
    "contiguous": lambda late: late,
    "view": _reshape,
    "reshape": _reshape,
    "__getitem__": _index,
    "div": _step(0),
    "__truediv__": _step(0),
    "tanh": _step(1),
    "mul": _step(2),
    "__mul__": _step(2),
    "cross_entropy": _loss,
    "size": lambda late, *dim: late._recipe.shape[dim[0]] if dim else late._recipe.shape,
    "dim": lambda late: late._recipe.rows.dim(),
    "numel": lambda late: late._recipe.shape.numel(),
    "is_floating_point": lambda late: True,
}
_PROPERTIES: dict[Any, Callable[..., Any]] = {
    Tensor.shape.__get__: lambda late: late._recipe.shape,  # type: ignore[attr-defined]
    Tensor.dtype.__get__: lambda late: late._recipe.dtype,  # type: ignore[attr-defined]
    Tensor.device.__get__: lambda late: late._recipe.rows.device,
    Tensor.ndim.__get__: lambda late: late._recipe.rows.dim(),  # type: ignore[attr-defined]
}
