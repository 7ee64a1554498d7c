"""Tensors of other classes and layouts, in any argument, and modes: they see of an op what they see of torch's twin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchweld import ops, optim

Q = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
ROWS, VECTOR, CLASSES = Q[0, 0], Q[0, 0, 0], torch.arange(5)

# A call of module m, ours or torch.nn.functional, with arguments from `make`, which dresses the one at `index` only.
Make = Callable[[int, Tensor], Tensor]
TWINS: dict[str, tuple[int, Callable[[Any, Make], Tensor]]] = {
    "layer_norm": (3, lambda m, a: m.layer_norm(a(0, ROWS), (8,), a(1, VECTOR), a(2, VECTOR))),
    "rms_norm": (2, lambda m, a: m.rms_norm(a(0, ROWS), (8,), a(1, VECTOR))),
    "gelu": (1, lambda m, a: m.gelu(a(0, ROWS), approximate="tanh")),
    "cross_entropy": (2, lambda m, a: m.cross_entropy(a(0, ROWS), a(1, CLASSES))),
    "sdpa": (4, lambda m, a: m.scaled_dot_product_attention(a(0, Q), a(1, Q), a(2, Q), a(3, ROWS[:, :5]))),
}
# Ours alone, beside plain tensors.
ALONE: dict[str, tuple[int, Callable[[Make], Any]]] = {
    "attention": (4, lambda a: ops.attention(a(0, Q), a(1, Q), a(2, Q), bias=a(3, ROWS[:, :5]))),
    "slopes": (2, lambda a: ops.attention(Q, Q, Q, alibi_slopes=a(0, VECTOR[:2]), sinks=a(1, VECTOR[:2]))),
    "linear_cross_entropy": (3, lambda a: ops.linear_cross_entropy(a(0, ROWS), a(1, ROWS), CLASSES, a(2, VECTOR[:5]))),
    "add_layer_norm": (4, lambda a: ops.add_layer_norm(a(0, ROWS), a(1, ROWS), (8,), a(2, VECTOR), a(3, VECTOR))[0]),
    "add_rms_norm": (3, lambda a: ops.add_rms_norm(a(0, ROWS), a(1, ROWS), (8,), a(2, VECTOR))[0]),
    "rms_norm": (2, lambda a: ops.rms_norm(a(0, ROWS), (8,), a(1, VECTOR), zero_centered_weight=True)),
    "swiglu": (2, lambda a: ops.swiglu(a(0, ROWS), a(1, ROWS))),
    "geglu": (2, lambda a: ops.geglu(a(0, ROWS), a(1, ROWS), approximate="tanh")),
    "rotary_embedding": (4, lambda a: torch.add(*ops.rotary_embedding(a(0, Q), a(1, Q), a(2, ROWS), a(3, ROWS)))),
}  # fmt: skip


def plain(_: int, t: Tensor) -> Tensor:
    return t


def dressed(index: int, dress: Callable[[Tensor], Tensor]) -> Make:
    return lambda i, t: dress(t) if i == index else t


class Tagged(Tensor):
    """Keeps its type, and no more."""


class Known(Tensor):
    """Has rules of its own for torch's functions."""

    seen: ClassVar[list[Any]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


class TaggedParameter(torch.nn.Parameter):
    pass


def two(t: Tensor) -> Tensor:
    return TwoTensor(t.clone(), t.clone())


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dress", [two, lambda t: t.as_subclass(Tagged), TaggedParameter, torch.nn.Buffer])
@pytest.mark.parametrize("name", TWINS)
def test_any_argument_may_be_of_another_class(name: str, dress: Callable[[Tensor], Tensor], grad: bool) -> None:
    count, call = TWINS[name]

    def run(m: Any, index: int) -> list[Tensor]:
        leaf = torch.zeros((), requires_grad=grad)
        out = call(m, dressed(index, lambda t: dress(t + leaf) if t.is_floating_point() else two(t)))
        if grad and out.requires_grad and not isinstance(out, TwoTensor):
            return [out, *(g for g in torch.autograd.grad(out.sum(), leaf, allow_unused=True) if g is not None)]
        return [out]

    for index in range(count):
        for ours, theirs in zip(run(ops, index), run(F, index), strict=True):
            assert type(ours) is type(theirs), index
            torch.testing.assert_close(getattr(ours, "a", ours), getattr(theirs, "a", theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dress", [two, lambda t: t.as_subclass(Tagged), lambda t: t.as_subclass(Known)])
@pytest.mark.parametrize("name", ALONE)
def test_functions_without_a_twin_serve_other_classes(name: str, dress: Callable[[Tensor], Tensor]) -> None:
    count, call = ALONE[name]
    expected = call(plain)
    for index in range(count):
        out = call(dressed(index, dress))
        assert type(out) is type(dress(ROWS)), index
        torch.testing.assert_close(getattr(out, "a", out.as_subclass(Tensor)), expected)


@pytest.mark.parametrize("name", TWINS)
def test_rules_for_torch_functions_are_asked(name: str) -> None:
    count, call = TWINS[name]
    twin = F.scaled_dot_product_attention if name == "sdpa" else getattr(F, name)
    for index in range(count):
        Known.seen.clear()
        assert isinstance(call(ops, dressed(index, lambda t: t.as_subclass(Known))), Known)
        assert Known.seen[0] is twin

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[Any] = []
    with Mode():
        call(ops, plain)
    assert twin in seen


@pytest.mark.parametrize("name", TWINS)
def test_a_device_context_keeps_the_kernels(name: str) -> None:
    ran = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ran.append(func.namespace)
            return func(*args, **(kwargs or {}))

    with torch.device("cpu"), Mode():
        TWINS[name][1](ops, plain)
    assert "torchweld" in ran


def test_a_fake_tensor_in_any_argument_gives_a_fake_result() -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for count, call in TWINS.values():
        for index in range(count):
            out = call(ops, dressed(index, mode.from_tensor))
            assert type(out) is type(mode.from_tensor(Q)) and out.dtype is torch.float32


def test_an_uninitialized_parameter_is_refused_as_by_torch() -> None:
    for m in (F, ops):
        with pytest.raises(ValueError, match="uninitialized parameter"):
            m.layer_norm(ROWS, (8,), torch.nn.UninitializedParameter())


def test_a_step_over_wrappers_is_dispatched() -> None:
    weights = [torch.nn.Parameter(two(VECTOR)), torch.nn.Parameter(VECTOR.clone())]
    for w in weights:
        w.grad = torch.ones_like(w)
    optim.SGD(weights, lr=0.5).step()
    torch.testing.assert_close(weights[0].a, weights[1].detach())  # type: ignore[attr-defined]


# ---- Layouts


PROTOTYPE = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")


def nested(layout: torch.layout, *shapes: Sequence[int]) -> Tensor:
    return torch.nested.nested_tensor([torch.ones(*s) for s in shapes], layout=layout)


@PROTOTYPE
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_nested_tensors_are_served_where_torch_serves_them(layout: torch.layout) -> None:
    x, q = nested(layout, (3, 8), (5, 8)), nested(layout, (3, 2, 8), (5, 2, 8)).transpose(1, 2)
    for call in (
        lambda m: m.layer_norm(x, (8,)),
        lambda m: m.layer_norm(x, (8,), VECTOR, VECTOR),
        lambda m: m.rms_norm(x, (8,)),
        lambda m: m.gelu(x),
        lambda m: m.gelu(x, approximate="tanh"),
        lambda m: m.cross_entropy(x, CLASSES),
        lambda m: m.scaled_dot_product_attention(q, q, q),
    ):
        try:
            expected = call(F)
        except (RuntimeError, ValueError):
            with pytest.raises((TypeError, RuntimeError), match=r"nested|ragged"):
                call(ops)
        else:
            for ours, theirs in zip(call(ops).unbind(), expected.unbind(), strict=True):
                torch.testing.assert_close(ours, theirs)


@PROTOTYPE
def test_nested_tensors_that_nobody_serves_are_named() -> None:
    x = nested(torch.strided, (3, 8), (5, 8))
    for call, argument in (
        (lambda: ops.add_layer_norm(x, x, (8,)), "add_layer_norm] x"),
        (lambda: ops.rms_norm(x, (8,)), "rms_norm] input"),
        (lambda: ops.swiglu(x, x), "swiglu] gate"),
        (lambda: ops.rotary_embedding(Q, x), "rotary_embedding] key"),
        (lambda: ops.attention(Q, x, x), "attention] key"),
    ):
        with pytest.raises(TypeError, match=rf"{argument}: expected a dense tensor, but got a nested one; convert it"):
            call()


class Duck:
    """No tensor, but with rules for torch's functions, as a Proxy of torch.fx."""

    def __init__(self, t: Tensor) -> None:
        self.t = t

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def inside(value: Any) -> Any:
            return value.t if isinstance(value, Duck) else value

        found = function(*map(inside, args), **{k: inside(v) for k, v in (kwargs or {}).items()})
        return tuple(map(Duck, found)) if isinstance(found, tuple) else Duck(found)


@pytest.mark.parametrize("name", TWINS)
def test_what_is_no_tensor_but_has_rules_for_torchs_functions(name: str) -> None:
    count, call = TWINS[name]
    for index in range(count):
        make: Any = dressed(index, Duck)  # type: ignore[arg-type]
        torch.testing.assert_close(call(ops, make).t, call(F, make).t)  # type: ignore[attr-defined]
    assert isinstance(ops.dropout(Duck(Q), 0.5), Duck)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ALONE)
def test_what_has_rules_sees_an_op_that_torch_has_not(name: str) -> None:
    count, call = ALONE[name]
    for index in range(count):
        found: Any = call(dressed(index, Duck))  # type: ignore[arg-type]
        torch.testing.assert_close(found.t, call(plain))


class Layers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(VECTOR.clone())

    def forward(self, x: Tensor) -> Tensor:
        x = ops.gelu(ops.layer_norm(x, (8,), self.weight), "tanh")
        return ops.swiglu(ops.dropout(x, 0.0), ops.rms_norm(x, (8,)))


def test_a_symbolic_trace_records_calls() -> None:
    module = Layers()
    traced = torch.fx.symbolic_trace(module)
    assert {F.layer_norm, ops.swiglu} <= {node.target for node in traced.graph.nodes}
    torch.testing.assert_close(traced(ROWS), module(ROWS))
