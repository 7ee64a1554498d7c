"""The `torchweld` operator library: how a kernel becomes an op that torch.compile, export and opcheck understand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchweld import backend
from torchweld.ops._flops import inform_counters

_library = torch.library.Library("torchweld", "DEF")


_dispatch_modes = torch._C._len_torch_dispatch_stack
_profiling = torch._C._autograd._profiler_enabled
_batched = torch._C._functorch.is_legacy_batchedtensor
_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Defines `torchweld::<schema>` for CPU and CUDA, `fake` giving shapes, dtypes and strides; returns its caller.

    The caller goes straight to `kernel` where the dispatcher would have nothing to add (plain tensors, and no mode,
    tracer or profiler that wants to see the op): 2.5 us saved of 8 for a small layer norm, 0.1 us per tensor of a list.
    What that costs: a lazily negated tensor (`z.conj().imag`) behind the first is for the kernel to `settle`.
    """
    name = schema[: schema.index("(")]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel, "CPU")
    _library.impl(name, kernel, "CUDA")
    torch.library.register_fake(f"torchweld::{name}", fake, lib=_library)
    op = getattr(torch.ops.torchweld, name).default

    def call(first: Any, *rest: Any) -> Any:
        if torch.compiler.is_compiling() or _profiling():
            return op(first, *rest)
        if _dispatch_modes():
            inform_counters()
            return op(first, *rest)
        if type(first) in _PLAIN:
            return op(first, *rest) if first.is_neg() else kernel(first, *rest)
        if isinstance(first, (list, tuple)) and _PLAIN.issuperset(map(type, first)):
            return kernel(first, *rest)
        return op(first, *rest)

    return call


def settle(t: Tensor) -> Tensor:
    """`t.contiguous()`, and negated in memory where it was so lazily, of which DLPack does not tell the kernels."""
    return (t.resolve_neg() if t.is_neg() else t).contiguous()


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd must record a call with these inputs."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def _distinct(args: Sequence[Any]) -> list[Any]:
    """`args` without a tensor that comes twice (keys that are the values too), which Dynamo refuses."""
    distinct: list[Any] = []
    for a in args:
        again = isinstance(a, Tensor) and any(a is other for other in distinct)
        distinct.append(a.view_as(a) if again else a)
    return distinct


def check_dense(op: str, **tensors: Tensor) -> None:
    """Raises TypeError for what is no tensor, or a nested or sparse one, of which the ops know nothing."""
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"[{op}] {name}: expected a torch.Tensor, but got {type(t).__name__}")
        if t.is_nested or t.layout is not torch.strided:
            kind = "nested" if t.is_nested else str(t.layout).removeprefix("torch.")
            remedy = "torch.nested.to_padded_tensor(x, 0.0)" if t.is_nested else "x.to_dense()"
            raise TypeError(f"[{op}] {name}: expected a dense tensor, but got a {kind} one; convert it with {remedy}")


def under_autocast(t: Tensor) -> bool:
    """Whether autocast is on for t's device; a device that has none (meta) is an error to torch's own question."""
    kind = t.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def float32_under_autocast(first: Tensor, *rest: Tensor | None) -> tuple[Any, ...]:
    """The tensors, those of 16 bits in float32 where autocast is on: what it does to torch's norms and losses."""
    tensors = (first, *rest)
    if not under_autocast(first):
        return tensors
    return tuple(t.float() if t is not None and t.dtype in (torch.bfloat16, torch.float16) else t for t in tensors)


def applier(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` without its look for functorch transforms, which `backend.choose` has sent to the reference.

    Worth 2.4 us of 13 for a small layer norm. Dynamo knows only the class's own `apply`.
    """
    fast = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def apply(*args: Any) -> Any:
        return function.apply(*_distinct(args)) if torch.compiler.is_compiling() else fast(*args)

    return apply


def wants_definition(*grads: Tensor | None) -> bool:
    """Whether a backward is itself to be derived (`create_graph=True`) or batched (`is_grads_batched=True`, vmap).

    The kernels' gradients are constants to the one and opaque to the other; those of the reference are neither.
    """
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or backend.transforms_active() or any(g is not None and _batched(g) for g in grads)


def double_backward(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients that can themselves be differentiated: those of the reference `function(*inputs)`.

    Called by a backward that `wants_definition`.
    """
    with torch.enable_grad():
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
        wanted = [x for x, need in zip(inputs, needed, strict=True) if need and x is not None]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True
            )
        )
    return [next(found) if need and x is not None else None for x, need in zip(inputs, needed, strict=True)]
