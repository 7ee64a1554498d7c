"""The `torchweld` operator library: how a kernel becomes an op that torch.compile, export and opcheck understand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from torchweld import _torch, reference
from torchweld.ops._arguments import FREED, check_memory, defined, explain, is_freed
from torchweld.ops._flops import inform_counters
from torchweld.ops._records import Layout

_library = torch.library.Library("torchweld", "DEF")


_compiling = torch.compiler.is_dynamo_compiling
_dispatch_modes = _torch.dispatch_modes
_function_modes = _torch.function_modes
_profiling = _torch.profiling
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


def register(
    schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], *records: type[Any]
) -> Callable[..., Any]:
    """Defines `torchweld::<schema>` for CPU and CUDA, `fake` giving shapes, dtypes and strides; returns its caller.

    Kernel, fake and caller take the arguments of `schema`. Those of a type in `records` are NamedTuples, which torch's
    operator lists field by field.

    The caller goes straight to `kernel` where the dispatcher would have nothing to add (no mode, tracer or profiler
    that wants to see the op): 2.5 us saved of 8 for a small layer norm, 0.1 us per tensor of a list. The bindings raise
    BufferError, before memory is touched, for a tensor that only the dispatcher can take apart, wherever it stands.
    What that costs: a lazily negated tensor (`z.conj().imag`) behind the first is for the kernel to `settle`.
    """
    name = schema[: schema.index("(")]
    layout = Layout(schema, records)
    _library.define(layout.schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.torchweld, name).default
    arguments = _torch.arguments_of(op)
    names = tuple(a.name for a in arguments)
    needed = tuple(i for i, a in enumerate(arguments) if isinstance(a.type, torch.TensorType))

    def checked(function: Callable[..., Any]) -> Callable[..., Any]:
        """The dispatcher takes None where the schema has a tensor, and knows no records."""

        @wraps(function)
        def call(*args: Any) -> Any:
            for i in needed:
                if args[i] is None:
                    raise TypeError(f"[{name}] {names[i]}: expected a torch.Tensor, but got None")
            return function(*layout.packed(args))

        return call

    _library.impl(name, checked(kernel), "CPU")
    _library.impl(name, checked(kernel), "CUDA")
    torch.library.register_fake(f"torchweld::{name}", checked(fake), lib=_library)
    takes_lists = "[]" in layout.schema.partition(" ")[0]

    def named(*args: Any) -> dict[str, Any]:
        return dict(zip(names, layout.flat(args), strict=False))

    def call(first: Any, *rest: Any) -> Any:
        if _compiling() or _profiling():
            return op(*layout.flat((first, *rest)))
        if _dispatch_modes():
            inform_counters()
            return op(*layout.flat((first, *rest)))
        try:
            if not takes_lists and first.is_neg():
                check_memory(name, **{names[0]: first})
                return op(*layout.flat((first, *rest)))
            try:
                return kernel(first, *rest)
            except BufferError:
                check_memory(name, **named(first, *rest))  # torch prints what it refuses
                return op(*layout.flat((first, *rest)))
        except Exception as error:
            explain(name, error, named(first, *rest))

    return call


def elsewhere(
    ours: Callable[..., Any], twin: Callable[..., Any] | None, names: Sequence[str], *tensors: Any
) -> Callable[..., Any] | None:
    """What is to be called instead of the public function `ours`; None, nearly always, if nothing is.

    A mode, or a class of tensors, that has rules of its own for torch's functions and operators knows torch's `twin` of
    the function; where there is none, the reference, which consists of torch's operators.

    Args:
        names: what the arguments `tensors` are called, in errors.

    Raises:
        TypeError: one of `tensors` is neither a tensor nor None.
    """
    if _compiling():
        if all(type(t) in _PLAIN for t in tensors):
            return None
    elif _PLAIN.issuperset(map(type, tensors)) and not _function_modes():
        return None
    return _elsewhere(ours, twin, names, tensors)


def _elsewhere(
    ours: Callable[..., Any], twin: Callable[..., Any] | None, names: Sequence[str], tensors: Sequence[Any]
) -> Callable[..., Any] | None:
    for name, t in zip(names, tensors, strict=True):
        if t is not None and not isinstance(t, Tensor):
            raise TypeError(f"[{ours.__name__}] {name}: expected a torch.Tensor, but got {type(t).__name__}")
    theirs = twin or getattr(reference, ours.__name__)
    if _compiling():
        return theirs
    classes = [type(t) for t in tensors if t is not None]
    if torch.overrides.has_torch_function(tensors):
        # torch.device as a context, and a subclass that only keeps its type, do the same for every function.
        # So do the modes of torch.export, which record what is called; and those of patch(), which call `ours`.
        modes = () if torch.compiler.is_compiling() else _torch.function_mode_stack()
        keeps = all(getattr(c.__torch_function__, "__func__", None) in _KEEP_TYPE for c in classes)
        if twin is None or (
            keeps and all(isinstance(mode, _torch.DeviceContext) or hasattr(mode, "calls_torchweld") for mode in modes)
        ):
            theirs = partial(torch.overrides.handle_torch_function, ours, tensors)
    elif all(c.__torch_dispatch__ is Tensor.__torch_dispatch__ or issubclass(c, _TRACERS) for c in classes):
        return None
    return partial(defined, theirs, ours.__name__, dict(zip(names, tensors, strict=True)))


_KEEP_TYPE = (Tensor.__torch_function__.__func__, None)  # type: ignore[attr-defined]  # None: of Parameter
_TRACERS = (_torch.FakeTensor, _torch.FunctionalTensor)  # they ask for shapes, or record the op: they know ours as well


def settle(t: Tensor, at: str, dtype: torch.dtype | None = None) -> Tensor:
    """`t` as a kernel reads it: contiguous, of `dtype` if one is given, and negated in memory if it was so lazily.

    `at` names it in an error, "[op] argument".
    """
    if t.is_contiguous() and not t.is_neg() and (dtype is None or t.dtype is dtype):
        return t
    if is_freed(t):
        raise ValueError(f"{at}: {FREED}")
    return (t.resolve_neg() if dtype is None else t.resolve_neg().to(dtype)).contiguous()


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
        return function.apply(*_distinct(args)) if _compiling() else fast(*args)

    return apply


def wants_definition(*grads: Tensor | None) -> bool:
    """Whether a backward is itself to be derived (`create_graph=True`) or batched (`is_grads_batched=True`, vmap).

    The kernels' gradients are constants to the one and opaque to the other; those of the reference are neither.
    """
    if torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() or _torch.transforms_active():
        return True
    return any(g is not None and _torch.is_batched(g) for g in grads)


def double_backward(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients that can themselves be differentiated: those of the reference `function(*inputs)`.

    Called by a backward that `wants_definition`.
    """
    check_memory("backward", **{f"saved tensor {i}": t for i, t in enumerate(inputs)})
    check_memory("backward", **{f"gradient {i}": t for i, t in enumerate(grads)})
    with torch.enable_grad():
        # Views, for one input may have been made of another, whose gradient would then contain its own.
        inputs = [x.view_as(x) if x is not None and need else x for x, need in zip(inputs, needed, strict=True)]
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
