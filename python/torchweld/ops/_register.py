"""The `torchweld` operator library: how a kernel becomes an op that torch.compile, export and opcheck understand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchweld import _torch, backend, reference
from torchweld._torch import constant_for_dynamo
from torchweld.ops._arguments import FREED, check_memory, defined, explain, is_freed
from torchweld.ops._flops import inform_counters
from torchweld.ops._records import Layout

_library = torch.library.Library("torchweld", "DEF")


class Registered(NamedTuple):
    """An op: as torch dispatches it, its kernel for the arguments of the schema, and which of these are tensors."""

    op: Callable[..., Any]
    kernel: Callable[..., Any]
    layout: Layout
    tensors: tuple[int, ...]


_registered: dict[str, Registered] = {}
compiling = torch.compiler.is_dynamo_compiling
_dispatch_modes = _torch.dispatch_modes
_function_modes = _torch.function_modes
_profiling = _torch.profiling
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))
_DTENSOR = "torch.distributed.tensor"  # the module of DTensor, which costs half a second to import
_on_dtensors: list[Callable[..., Any]] = []  # what serves calls with DTensors, once it is found
_find: list[Callable[[], Callable[..., Any]]] = []
# What compiled calls of attention go to, the last first: function(ours, *args, **options). Eager ones meet a mode.
compiled_attention: list[Callable[..., Any]] = []


def register(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    *records: type[Any],
) -> Callable[..., Any]:
    """Defines the operator `torchweld::<schema>` for CPU and CUDA, and returns the function that calls it.

    `kernel` computes, `fake` gives shapes, dtypes and strides. Kernel, fake and the returned function take the
    arguments of `schema`. Arguments of a type in `records` are NamedTuples, which torch's operator lists field by
    field.

    The returned function calls `kernel` itself where no mode, tracer or profiler wants to see the op. This saves 2.5 us
    of 8 for a small layer norm, and 0.1 us per tensor of a list. For a tensor that only the dispatcher can read, the
    bindings raise BufferError before they touch memory; the call then goes to the dispatcher. The dispatcher resolves
    lazily negated tensors (`z.conj().imag`). Without the dispatcher `kernel` must `settle` every tensor behind the
    first.
    """
    name = schema[: schema.index("(")]
    layout = Layout(schema, records)
    _library.define(layout.schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.torchweld, name).default
    arguments = _torch.arguments_of(op)
    names = tuple(a.name for a in arguments)
    needed = tuple(i for i, a in enumerate(arguments) if isinstance(a.type, torch.TensorType))

    def checked(function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` for the dispatcher, which lets None pass for a tensor and knows no records."""

        @wraps(function)
        def call(*args: Any) -> Any:
            for i in needed:
                if args[i] is None:
                    raise TypeError(f"[{name}] {names[i]}: expected a torch.Tensor, but got None")
            return function(*layout.packed(args))

        return call

    by_schema = checked(kernel)
    for device in ("CPU", "CUDA"):
        _library.impl(name, by_schema, device)
    places = tuple(i for i, a in enumerate(arguments) if str(a.type) in ("Tensor", "Optional[Tensor]"))
    _registered[name] = Registered(op, by_schema, layout, places)
    torch.library.register_fake(f"torchweld::{name}", checked(fake), lib=_library)
    takes_lists = "[]" in layout.schema.partition(" ")[0]

    def named(*args: Any) -> dict[str, Any]:
        return dict(zip(names, layout.flat(args), strict=False))

    def call(first: Any, *rest: Any) -> Any:
        if compiling() or _profiling():
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
                check_memory(name, **named(first, *rest))  # torch prints a tensor that it refuses
                return op(*layout.flat((first, *rest)))
        except Exception as error:
            explain(name, error, named(first, *rest))

    return call


def differentiate(name: str, function: Callable[..., Any]) -> None:
    """Gives `torch.ops.torchweld.<name>` gradients, where a program calls it by name: one that was exported.

    `function` takes the op's arguments, with records, and returns its outputs, recorded by autograd. Where nothing is
    recorded the kernel is called at once: another turn through the dispatcher costs 5 us.
    """
    op, kernel, layout, places = _registered[name]

    def call(*args: Any) -> Any:
        first, recorded = args[0], False
        plain = first is not None and not (_dispatch_modes() or _torch.transforms_active())
        for i in places:
            if (t := args[i]) is not None:
                recorded = recorded or t.requires_grad
                plain = plain and type(t) in _PLAIN
        if recorded and torch.is_grad_enabled():
            if _torch.transforms_active():
                remedy = "call the function of torchweld.ops"
                raise RuntimeError(f"[{name}] expected no transform of torch.func that differentiates; {remedy}")
            return function(*layout.packed(args))
        if plain and (first.is_cpu or first.is_cuda) and not first.is_neg():
            return kernel(*args)
        with _torch.below_autograd():
            return op(*args)

    _library.impl(name, call, "Autograd")


def elsewhere(
    ours: Callable[..., Any], twin: Callable[..., Any] | None, names: Sequence[str], *tensors: Any
) -> Callable[..., Any] | None:
    """The function to call in place of the public function `ours`; None, nearly always, if there is none.

    A mode or a class of tensors may have its own rules for torch's functions and operators. It knows `twin`, torch's
    function of the same name. Where torch has no such function, it knows the reference, which calls torch's operators.

    Args:
        names: what the arguments `tensors` are called, in errors.

    Raises:
        TypeError: one of `tensors` is neither a tensor nor None.
    """
    if compiling():
        if compiled_attention and ours.__name__ in ("attention", "scaled_dot_product_attention"):
            return partial(compiled_attention[-1], ours)
        if all(type(t) in _PLAIN for t in tensors):
            return None
    elif _PLAIN.issuperset(map(type, tensors)) and not _function_modes():
        return None
    return _elsewhere(ours, twin, names, tensors)


def _elsewhere(
    ours: Callable[..., Any], twin: Callable[..., Any] | None, names: Sequence[str], tensors: Sequence[Any]
) -> Callable[..., Any] | None:
    for name, t in zip(names, tensors, strict=True):
        if t is not None and not isinstance(t, Tensor) and not hasattr(type(t), "__torch_function__"):
            raise TypeError(f"[{ours.__name__}] {name}: expected a torch.Tensor, but got {type(t).__name__}")
    if any(type(t).__module__ == _DTENSOR for t in tensors):
        _find_once()
        return partial(_on_dtensors[0], ours)
    theirs = twin or getattr(reference, ours.__name__)
    if not all(t is None or isinstance(t, Tensor) for t in tensors):  # a Proxy of torch.fx, for one
        return partial(torch.overrides.handle_torch_function, twin or ours, tensors)
    if compiling():
        return theirs
    classes = [type(t) for t in tensors if t is not None]
    if torch.overrides.has_torch_function(tensors):
        # Some modes and classes treat all functions alike: torch.device as a context, a subclass that only keeps its
        # type, the modes of torch.export, which record calls, and those of patch(), which call `ours`.
        modes = () if torch.compiler.is_compiling() else _torch.function_mode_stack()
        keeps = all(getattr(c.__torch_function__, "__func__", None) in _KEEP_TYPE for c in classes)
        if twin is None or (
            keeps and all(isinstance(mode, _torch.DeviceContext) or hasattr(mode, "calls_torchweld") for mode in modes)
        ):
            theirs = partial(torch.overrides.handle_torch_function, ours, tensors)
    elif all(c.__torch_dispatch__ is Tensor.__torch_dispatch__ or issubclass(c, _TRACERS) for c in classes):
        return None
    return partial(defined, theirs, ours.__name__, dict(zip(names, tensors, strict=True)))


def serve_dtensors(find: Callable[[], Callable[..., Any]]) -> None:
    """Tells what serves calls with DTensors: `find()(function, *args, **options)`, found at the first such call."""
    _find[:] = [find]


def _find_once() -> None:
    if not _on_dtensors:
        _on_dtensors.append(_find[0]())


constant_for_dynamo(_find_once)  # an import is not traced


_KEEP_TYPE = (Tensor.__torch_function__.__func__, None)  # type: ignore[attr-defined]  # None: of Parameter
_TRACERS = (_torch.FakeTensor, _torch.FunctionalTensor)  # they ask an op for shapes, or record it, so they need no twin


def settle(t: Tensor, at: str, dtype: torch.dtype | None = None) -> Tensor:
    """`t` as a kernel reads it: contiguous, of `dtype` if given, and negated in memory if `t` is lazily negated.

    An error names the tensor by `at`, "[op] argument".
    """
    if t.is_contiguous() and not t.is_neg() and (dtype is None or t.dtype is dtype):
        return t
    if is_freed(t):
        raise ValueError(f"{at}: {FREED}")
    return (t.resolve_neg() if dtype is None else t.resolve_neg().to(dtype)).contiguous()


def memory_order(t: Tensor) -> list[int]:
    """The dimensions of a dense tensor in the order in which its memory has them: permuted by it, it is contiguous."""
    return sorted(range(t.dim()), key=t.stride, reverse=True)


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd must record a call with these inputs."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def _distinct(args: Sequence[Any]) -> list[Any]:
    """`args` with a view for each repeated tensor, for Dynamo refuses the same tensor twice."""
    distinct: list[Any] = []
    for a in args:
        again = isinstance(a, Tensor) and any(a is other for other in distinct)
        distinct.append(a.view_as(a) if again else a)
    return distinct


def under_autocast(t: Tensor) -> bool:
    """Whether autocast is on for t's device. torch's own function raises for a device without autocast (meta)."""
    kind = t.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def float32_under_autocast(first: Tensor, *rest: Tensor | None) -> tuple[Any, ...]:
    """The tensors. Under autocast those of 16 bits become float32, as for torch's norms and losses."""
    tensors = (first, *rest)
    if not under_autocast(first):
        return tensors
    return tuple(t.float() if t is not None and t.dtype in (torch.bfloat16, torch.float16) else t for t in tensors)


def applier(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` without its check for functorch transforms, for `backend.choose` sends those to the reference.

    This saves 2.4 us of 13 for a small layer norm. Dynamo traces only the class's own `apply`.
    """
    fast = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def apply(*args: Any) -> Any:
        return function.apply(*_distinct(args)) if compiling() else fast(*args)

    return apply


def recorder(definition: type[torch.autograd.Function], name: str, *slots: str) -> Callable[..., Any]:
    """`definition.apply` for eager calls, in C++ from the call to the kernel and back (csrc/bindings/node.h).

    The functions of `node_<name>_*` serve common calls, and hand others to `definition.forward(ctx, ...)` and
    `definition.gradients(ctx, ctx.saved_tensors, *doutputs)`. `slots` are the attributes that they set on `ctx`. Of a
    small step, forward and backward, this saves 3 us of 34 for GELU, and 14 of 71 for attention.
    """
    nodes = backend.node(name)
    return applier(definition) if nodes is None else _torch.node_of(definition, slots, *nodes)


def wants_definition(*grads: Tensor | None) -> bool:
    """Whether a backward is itself differentiated (`create_graph=True`) or batched (`is_grads_batched=True`, vmap).

    Only the reference can serve both: autograd and vmap cannot look into a kernel.
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
    """Gradients of `function(*inputs)`, a function of the reference, which can be differentiated again.

    A backward calls this where `wants_definition` is true.
    """
    check_memory("backward", **{f"saved tensor {i}": t for i, t in enumerate(inputs)})
    check_memory("backward", **{f"gradient {i}": t for i, t in enumerate(grads)})
    with torch.enable_grad():
        # Views: if one input was computed from another, the gradient of that other input must not include it.
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
