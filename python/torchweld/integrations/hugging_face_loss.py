"""The loss of Hugging Face language models from the input of their output layer: logits that nobody reads are not made.

In a training call with labels the output layer returns `LateLogits` in place of logits. The models' own code reshapes
them, casts them, caps them and hands them to `torch.nn.functional.cross_entropy`, which becomes
`ops.linear_cross_entropy`. Whatever else reads them gets the logits, made at that moment.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchweld import ops
from torchweld._torch import has_global_hooks, has_hooks, no_torch_function
from torchweld.ops._register import under_autocast


@dataclass(frozen=True)
class _Recipe:
    """How logits are made: linear(hidden, weight, bias), then a softcap as far as the model has come with it."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    cap: float = 0.0
    steps: int = 0  # of logits / cap, tanh, * cap

    def make(self) -> Tensor:
        logits = F.linear(self.hidden, self.weight, self.bias)
        for step in (lambda x: x / self.cap, torch.tanh, lambda x: x * self.cap)[: self.steps]:
            logits = step(logits)
        return logits.to(self.dtype)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))


class LateLogits(Tensor):
    """Logits that are made when something reads their values; they look like a tensor of their shape and dtype."""

    _recipe: _Recipe
    _made: Tensor | None

    @staticmethod
    def of(recipe: _Recipe) -> LateLogits:
        """The logits of a recipe."""
        late = torch.empty(recipe.shape, dtype=recipe.dtype, device="meta").as_subclass(LateLogits)
        late._recipe, late._made = recipe, None
        return late

    def made(self) -> Tensor:
        """The logits, from now on kept."""
        if self._made is None:
            self._made = self._recipe.make()
        return self._made

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are plain tensors."""
        return self.made().__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """A function that needs no logits is answered; for any other they are made."""
        rule = _RULES.get(getattr(func, "__name__", ""))
        if getattr(func, "__name__", "") == "__get__":
            rule = _PROPERTIES.get(func)
        first = args[0] if args else None
        plain = not kwargs or rule is _loss  # no other rule knows options by name, as in size(dim=1)
        if rule is not None and plain and isinstance(first, LateLogits) and first._made is None:
            found = rule(first._recipe, *args[1:], **(kwargs or {}))
            if found is not NotImplemented:
                return LateLogits.of(found) if isinstance(found, _Recipe) else found
        return func(*_now(args), **_now(kwargs or {}))


def _now(value: Any) -> Any:
    """`value` with all late logits in it made."""
    if isinstance(value, LateLogits):
        with no_torch_function():
            return value.made()
    if isinstance(value, dict):
        return {k: _now(v) for k, v in value.items()}
    return type(value)(map(_now, value)) if type(value) in (tuple, list) else value


# ---- What needs no logits, by the names of torch's functions. NotImplemented: they are needed after all.


def _cast(recipe: _Recipe, *args: Any, **kwargs: Any) -> Any:
    dtype = args[0] if len(args) == 1 else None
    if kwargs or not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return NotImplemented
    return replace(recipe, dtype=dtype)


def _reshape(recipe: _Recipe, *shape: Any) -> Any:
    sizes = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    if len(sizes) < 2 or sizes[-1] != recipe.weight.shape[0] or not all(isinstance(n, int) for n in sizes):
        return NotImplemented
    return replace(recipe, hidden=recipe.hidden.reshape(*sizes[:-1], recipe.hidden.shape[-1]))


def _index(recipe: _Recipe, index: Any) -> Any:
    """logits[..., a:b, :]: all classes of some positions."""
    parts = index if isinstance(index, tuple) else (index,)
    if not all(part is Ellipsis or isinstance(part, (slice, int)) for part in parts):
        return NotImplemented
    reaches_classes = Ellipsis in parts or len(parts) >= recipe.hidden.dim()
    if reaches_classes and parts[-1] != slice(None):
        return NotImplemented
    return replace(recipe, hidden=recipe.hidden[index])


def _step(number: int) -> Callable[..., Any]:
    """One of the three operations of a softcap, in their order."""

    def rule(recipe: _Recipe, *args: Any) -> Any:
        cap = recipe.cap
        if number == 0 and len(args) == 1 and isinstance(args[0], (int, float)) and args[0] > 0:
            cap = float(args[0])
        fits = len(args) == (number != 1) and (number != 2 or args[0] == cap) and cap > 0
        return replace(recipe, cap=cap, steps=number + 1) if fits and recipe.steps == number else NotImplemented

    return rule


def _loss(
    recipe: _Recipe,
    target: Any,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    common = isinstance(target, Tensor) and target.dtype is torch.int64 and target.dim() == recipe.hidden.dim() - 1 == 1
    if not common or not (weight is size_average is reduce is None) or recipe.steps not in (0, 3):
        return NotImplemented
    x = recipe.hidden
    # Logits of 16 bits that the model casts to float32: their product is in 16 bits, their loss in float32.
    wide = recipe.dtype is torch.float32 and x.dtype is not torch.float32 and not under_autocast(x)
    with torch.autocast(x.device.type, x.dtype) if wide else nullcontext():
        loss = ops.linear_cross_entropy(
            x,
            recipe.weight,
            target,
            recipe.bias,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            softcap=recipe.cap if recipe.steps else None,
        )
    return loss.to(recipe.dtype)


_RULES: dict[str, Callable[..., Any]] = {
    "float": lambda recipe: replace(recipe, dtype=torch.float32),
    "to": _cast,
    "contiguous": lambda recipe: recipe,
    "view": _reshape,
    "reshape": _reshape,
    "__getitem__": _index,
    "div": _step(0),
    "__truediv__": _step(0),
    "tanh": _step(1),
    "mul": _step(2),
    "__mul__": _step(2),
    "cross_entropy": _loss,
    "size": lambda recipe, *dim: recipe.shape[dim[0]] if dim else recipe.shape,
    "dim": lambda recipe: recipe.hidden.dim(),
    "numel": lambda recipe: recipe.shape.numel(),
    "is_floating_point": lambda recipe: True,
}
_PROPERTIES: dict[Any, Callable[..., Any]] = {
    Tensor.shape.__get__: lambda recipe: recipe.shape,  # type: ignore[attr-defined]
    Tensor.dtype.__get__: lambda recipe: recipe.dtype,  # type: ignore[attr-defined]
    Tensor.device.__get__: lambda recipe: recipe.hidden.device,
    Tensor.ndim.__get__: lambda recipe: recipe.hidden.dim(),  # type: ignore[attr-defined]
}

# ---- Models


def is_language_model(cls: Any) -> bool:
    """Whether a class of transformers has an output layer over a vocabulary, and makes a loss of its logits."""
    named = cls.__name__.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration"))
    return named and hasattr(cls, "get_output_embeddings") and "labels" in inspect.signature(cls.forward).parameters


def why_no_loss(model: Any) -> str | None:
    """Why the loss of a model stays as it is; None if it does not."""
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        return f"its output layer is a {type(head).__name__}, no torch.nn.Linear"
    return None


def late_forward(stock: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a class, with late logits in a training call with labels."""

    @wraps(stock)
    def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
        head = model.get_output_embeddings()
        if (
            kwargs.get("labels") is None
            or not (model.training and torch.is_grad_enabled())
            or torch.compiler.is_compiling()
            or type(head) is not torch.nn.Linear
            or "forward" in vars(head)
            or has_hooks(head)
            or has_global_hooks()
        ):
            return stock(model, *args, **kwargs)
        with _late(head):
            return stock(model, *args, **kwargs)

    return forward


@contextmanager
def _late(head: torch.nn.Linear) -> Iterator[None]:
    """Inside, `head` returns late logits."""

    def call(hidden: Tensor) -> Tensor:
        weight, bias = head.weight, head.bias
        dtype = torch.get_autocast_dtype(hidden.device.type) if under_autocast(hidden) else weight.dtype
        if type(hidden) is not Tensor or (hidden.dtype is not weight.dtype and not under_autocast(hidden)):
            return F.linear(hidden, weight, bias)
        return LateLogits.of(_Recipe(hidden, weight, bias, dtype))

    head.__dict__["forward"] = call
    try:
        yield
    finally:
        del head.__dict__["forward"]
