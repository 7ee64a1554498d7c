"""How late logits are made, and their nodes of autograd: their gradients, their values, and losses that need none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torchweld._torch import version_of, wrapper
from torchweld.ops._arguments import is_freed


class Product(NamedTuple):
    """Input, weight and bias of an output layer."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def logits(self, dtype: torch.dtype) -> Tensor:
        """hidden @ weight^T + bias in a dtype, as autocast or the layer had it in the forward."""
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(self.hidden.device.type, enabled=False):
            return F.linear(self.hidden.to(dtype), self.weight.to(dtype), bias)


@dataclass(eq=False)
class LayerCall:
    """One call of an output layer. `kept` are its tensors without autograd, of which `versions` tells later writes.

    `apart`: the parameters among them are copies.
    """

    product: Product
    dtype: torch.dtype
    kept: Product = field(init=False)
    versions: tuple[int, ...] = field(init=False)
    apart: bool = False

    def __post_init__(self) -> None:
        hidden, weight, bias = self.product
        self.kept = Product(hidden.detach(), weight.detach(), None if bias is None else bias.detach())
        self.versions = self._versions()

    def _versions(self) -> tuple[int, ...]:
        return tuple(version_of(t) for t in self.kept if t is not None)

    def is_unchanged(self) -> bool:
        """Whether all is in memory as the forward had it."""
        return self._versions() == self.versions and not any(is_freed(t) for t in self.kept if t is not None)

    def keep(self, copies: dict[int, Tensor]) -> None:
        """Takes copies of the parameters before they are written to; `copies` has those of other calls, by `id`."""
        if self.apart or not self.is_unchanged():
            return
        self.apart = True
        for p, kept in zip(self.product[1:], self.kept[1:], strict=True):
            if kept is not None and id(p) not in copies:
                copies[id(p)] = kept.clone()
        _, weight, bias = self.product
        self.kept = Product(self.kept.hidden, copies[id(weight)], None if bias is None else copies[id(bias)])
        self.versions = self._versions()


class Op(NamedTuple):
    """A function of torch that late logits went through, with its arguments after the first."""

    function: Callable[..., Any]
    args: tuple[Any, ...]


def through(logits: Tensor, trail: Sequence[Op]) -> Tensor:
    for op in trail:
        logits = op.function(logits, *op.args)
    return logits


@dataclass
class Watch:
    """Whether something wants the gradient of these logits, which a loss that needs no logits does not compute."""

    wanted: bool = False


@dataclass(frozen=True)
class Recipe:
    """How logits are made: the call of the layer, then the operations of `trail`.

    `rows`: the input that gives these logits. `dtype`: theirs. `cap`, `steps`: of logits / cap, tanh, * cap, a softcap
    as far as the model has come with it.
    """

    call: LayerCall
    rows: Tensor
    dtype: torch.dtype
    cap: float = 0.0
    steps: int = 0
    trail: tuple[Op, ...] = ()

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.rows.shape[:-1], self.call.product.weight.shape[0]))

    def make(self) -> Tensor:
        """The logits of the forward."""
        if not self.call.is_unchanged():
            raise RuntimeError(
                "[patch] logits: expected the output layer as it was in the forward, but its input or its parameters "
                "were written to, or freed, since; read the logits before, or use patch(model, loss=False)"
            )
        return through(self.call.kept.logits(self.call.dtype), self.trail)


# ---- Autograd


class Made(torch.autograd.Function):
    """Late logits from the tensors of an output layer."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe, cls: type[Tensor]
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.dtype, ctx.trail = recipe.call.dtype, recipe.trail  # not the recipe: a loss that is kept keeps no tensors
        ctx.set_materialize_grads(False)
        late: Tensor = wrapper(cls, recipe.shape, recipe.dtype, recipe.rows.device)
        return late

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:3]
        if dlogits is None:
            return None, None, None, None, None
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            tensors = [_leaf(t, again) if need else t for t, need in zip(ctx.saved_tensors, needed, strict=True)]
            logits = through(Product(*tensors).logits(ctx.dtype), ctx.trail)
            wanted = [t for t, need in zip(tensors, needed, strict=True) if need]
            found = iter(torch.autograd.grad(logits, wanted, dlogits, create_graph=again))
        return *(next(found) if need else None for need in needed), None, None


def _leaf(t: Tensor, again: bool) -> Tensor:
    """A tensor to differentiate by; `again`: the gradient is differentiated too."""
    return t.view_as(t) if again else t.detach().requires_grad_()


class Read(torch.autograd.Function):
    """The values of late logits, by their recipe."""

    @staticmethod
    def forward(ctx: Any, late: Tensor, recipe: Recipe) -> Tensor:
        return recipe.make()

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor) -> tuple[Tensor, None]:
        return dlogits, None


class Loss(torch.autograd.Function):
    """A loss that needs no logits; its gradient goes by them where one of `line` is watched.

    `line`: the late logits from those of the layer to those of the loss. `watches`: theirs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        loss: Tensor,
        target: Tensor,
        options: dict[str, Any],
        recipe: Recipe,
        watches: list[Watch],
        *line: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*recipe.call.product, target)
        ctx.dtype, ctx.trail, ctx.options = recipe.call.dtype, recipe.trail, options
        ctx.watches = watches
        ctx.set_materialize_grads(False)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None) -> tuple[Tensor | None, ...]:
        watched = [i for i, watch in enumerate(ctx.watches) if watch.wanted]
        none = [None] * len(ctx.watches)
        if not watched or dloss is None:
            return dloss, None, None, None, None, *none
        *tensors, target = ctx.saved_tensors
        last, again = watched[-1], torch.is_grad_enabled()
        with torch.enable_grad():
            logits = through(Product(*tensors).logits(ctx.dtype), ctx.trail[:last])
            logits = logits if again else logits.detach().requires_grad_()
            loss = F.cross_entropy(through(logits, ctx.trail[last:]), target, **ctx.options)
            found: list[Any] = none
            found[last] = torch.autograd.grad(loss, logits, dloss.to(loss.dtype), create_graph=again)[0]
        return None, None, None, None, None, *found
