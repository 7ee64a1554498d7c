"""patch: code and classes that are odd. It is all or nothing, and what cannot be swapped is named."""

from __future__ import annotations

import abc
import functools
import types
import typing
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import torchweld
from patch_models import WIDTH, Model, helper
from torchweld import nn
from torchweld.patching.subclasses import is_swapped


class Silent:
    """Has every attribute, and is each of them."""

    def __call__(self, *args: Any, **kwargs: Any) -> Silent:
        return self

    def __getattr__(self, name: str) -> Silent:
        return self


class Raising:
    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(f"there is no {name}")


class Unequal:
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not to be compared")


class NotInstalled(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        raise ImportError(f"{self.__name__} is not installed")


# What a forward may name.
silent, raising, unequal, lazy = Silent(), Raising(), Unequal(), NotInstalled("lazy")
made = types.FunctionType((lambda x: x).__code__, {})  # as exec makes them: without a module
magic, array, tensor, builtin, operators = mock.MagicMock(), np.ones(3), torch.ones(3), len, torch.ops.aten
cached, bound, partly = functools.lru_cache(made), silent.__call__, functools.partial(helper)


class Names(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x is None:
            print(silent, raising, unequal, lazy, made, magic, array, tensor, builtin, operators, cached, bound)
        return x


class Reaches(Names):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return partly(x, x, super().forward(x))


class Attends(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x)


class Slots(Attends):
    __slots__ = ("extra",)


class Abstract(Attends, abc.ABC):
    pass


T = typing.TypeVar("T")


class Generic(Attends, typing.Generic[T]):
    pass


class MixedIn(Silent, Attends):
    def __getattr__(self, name: str) -> Any:
        return torch.nn.Module.__getattr__(self, name)

    __call__ = torch.nn.Module.__call__


class Frozen(Attends):
    """Raises at what other modules take, and has a property that raises."""

    approximate = property(lambda self: 1 / 0)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            raise RuntimeError("frozen")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        raise KeyError(name)


X = torch.randn(2, 7, WIDTH)


@pytest.mark.parametrize("cls", [Reaches, Attends, Slots, Abstract, Generic, MixedIn, Frozen])
def test_odd_classes_are_swapped_and_come_back(cls: type[torch.nn.Module]) -> None:
    module = cls()
    expected = module(X)
    report = torchweld.patch(module)
    assert is_swapped(type(module)) and isinstance(module, cls), str(report)
    torch.testing.assert_close(module(X), expected, rtol=1e-4, atol=1e-5)
    assert not report.undo().left and type(module) is cls


def test_odd_globals_stand_in_nobodys_way() -> None:
    model = torch.nn.Sequential(torch.nn.LayerNorm(WIDTH), Names())
    report = torchweld.patch(model)
    assert [e.name for e in report.swapped] == ["0"] and not report.left


def test_a_class_that_cannot_be_swapped_is_left_and_named() -> None:
    class Meta(type):
        def __new__(cls, name: str, bases: Any, body: Any) -> Any:
            if len(bases) > 1:
                raise KeyError("one base only")
            return super().__new__(cls, name, bases, body)

    class Only(Attends, metaclass=Meta):
        pass

    model = torch.nn.Sequential(Only(), torch.nn.LayerNorm(WIDTH))
    report = torchweld.patch(model)
    assert [(e.name, e.why) for e in report.left] == [("0", "it cannot be swapped: KeyError: 'one base only'")]
    assert type(model[0]) is Only and type(model[1]) is nn.LayerNorm
    assert model(X).shape == X.shape


def test_all_or_nothing() -> None:
    class Broken(torch.nn.Module):
        def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Module]]:
            yield from super().named_modules(*args, **kwargs)
            raise OSError("halfway")

    model = Broken()
    model.norm, model.attention = torch.nn.LayerNorm(WIDTH), Attends()
    with pytest.raises(OSError, match="halfway"):
        torchweld.patch(model)
    assert type(model.norm) is torch.nn.LayerNorm and type(model.attention) is Attends


def test_what_only_says_that_it_is_a_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"\[patch\] model: expected a torch.nn.Module, but got Mock"):
        torchweld.patch(mock.Mock(spec=torch.nn.Module))


def test_a_traced_graph_keeps_its_own_forward() -> None:
    graph = torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.LayerNorm(WIDTH), Attends()))
    kind, expected = type(graph), graph(X)
    torchweld.patch(graph)
    assert type(graph) is kind
    torch.testing.assert_close(graph(X), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_patches_of_parts_are_undone_in_any_order(order: tuple[int, ...]) -> None:
    model = Model()
    kinds = [type(m) for m in model.modules()]
    reports = [torchweld.patch(model.attentions), torchweld.patch(model, norms=False), torchweld.patch(model)]
    for i in order:
        assert not reports[i].undo().left
    assert [type(m) for m in model.modules()] == kinds


def test_compiled_before_and_after() -> None:
    model = Attends()
    expected, compiled = model(X), torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(X), expected)
    report = torchweld.patch(compiled)
    assert is_swapped(type(model))
    torch.testing.assert_close(compiled(X), expected, rtol=1e-4, atol=1e-5)
    report.undo()
    torch.testing.assert_close(compiled(X), expected)
