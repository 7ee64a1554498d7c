"""patch(model): walks the modules of a model, swaps what has a drop-in, and says why it left the rest."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from torchweld import backend
from torchweld.nn.twins import TWINS
from torchweld.patching.attention import attend, calls_attention
from torchweld.patching.changes import ClassChange, ForwardChange
from torchweld.patching.report import Entry, Report

# What each kind of swap runs on, by the names of the compiled modules' functions.
_KERNELS = {"norms": "layer_norm_forward", "attention": "attention_forward", "activations": "gelu_forward"}
_NEEDS = {
    torch.nn.LayerNorm: ("norms",),
    torch.nn.RMSNorm: ("norms",),
    torch.nn.MultiheadAttention: ("attention",),
}


def _gelu(module: Any, input: torch.Tensor) -> torch.Tensor:
    from torchweld import ops  # noqa: PLC0415

    return ops.gelu(input, module.approximate)


def _hugging_face() -> Any:
    """integrations.hugging_face; None while nobody has imported transformers, so that no model can be one of its."""
    if "transformers.modeling_utils" not in sys.modules:
        return None
    from torchweld.integrations import hugging_face  # noqa: PLC0415

    return hugging_face


def _full_name(cls: type) -> str:
    """As one would import it."""
    module = cls.__module__
    for package in ("torch.nn", "torchweld.nn", "transformers"):
        if module.startswith(package + "."):
            module = package
    return cls.__name__ if module == "__main__" else f"{module}.{cls.__name__}"


def _why_left(module: torch.nn.Module) -> str | None:
    """Why a module that is no stock layer stays as it is; None for one that has nothing to do with torchweld."""
    cls = type(module)
    base = next((b for b in TWINS if isinstance(module, b)), None)
    named = "norm" in cls.__name__.lower() or "attention" in cls.__name__.lower()
    if cls.__module__.startswith("torch.ao.") and (base or named):
        return "a quantised layer"
    if base is not None:
        own = cls.forward is not base.forward
        return f"a subclass of torch.nn.{base.__name__}" + (" with a forward of its own" if own else "")
    if named and not cls.__module__.startswith("transformers."):
        return "an unknown layer: torchweld has no drop-in for it"
    if "norm" in cls.__name__.lower():
        return "an unknown layer: none of the norms that torchweld knows"
    return None


class _Walk:
    """One call of `patch`."""

    def __init__(self, model: torch.nn.Module, asked: dict[str, bool]) -> None:
        self.report, self.hugging_face = Report(model), _hugging_face()
        self.kind = next((p.device.type for p in model.parameters()), "cpu")
        self.not_now = {kind: self._why_not(kind, wanted) for kind, wanted in asked.items()}
        self.done: set[int] = set()  # the modules inside of what is dealt with as a whole
        self.pretrained: set[int] = set()

    def _why_not(self, kind: str, wanted: bool) -> str | None:
        """Why nothing of a kind is swapped: it is not asked for, or would run on the reference, slower than torch."""
        if not wanted:
            return f"patch(..., {kind}=False)"
        if self.kind == "meta" or hasattr(backend.kernels.get(self.kind), _KERNELS[kind]):
            return None
        return f"there are no kernels for {kind} on {self.kind!r}"

    def run(self) -> Report:
        for name, module in self.report.model.named_modules():
            if id(module) in self.done:
                continue
            if isinstance(module, torch.jit.ScriptModule):
                self.report.leave(name, module.original_name, "compiled by torch.jit")
                self.done |= {id(m) for m in module.modules()}
                continue
            if self.hugging_face is not None and id(module) not in self.pretrained:
                self._pretrained(name, module)
            self._visit(name, module)
        return self.report

    def _pretrained(self, name: str, module: torch.nn.Module) -> None:
        found = self.hugging_face.attention_of(module)
        if found is None:
            return
        self.pretrained |= {id(m) for m in module.modules()}
        was, why = found
        if why := why or self.not_now["attention"]:
            self.report.leave(name, was, why)
        else:
            self.report.swap(Entry(name, was, "torchweld attention"), self.hugging_face.AttentionChange(module))

    def _visit(self, name: str, module: torch.nn.Module) -> None:
        cls, replaced = type(module), module.__dict__.get("forward")
        if cls in TWINS.values() or getattr(replaced, "func", None) in self._ours():
            self.report.leave(name, _full_name(cls), "already torchweld's")
            return
        found = self._change(module)
        if found is None:
            why = _why_left(module)
        else:
            needs, make, now = found
            why = next((reason for kind in needs if (reason := self.not_now[kind])), None)
            if replaced is not None:
                why = "its forward was replaced on the instance"
            elif why is None:
                self.report.swap(Entry(name, _full_name(cls), now), make())
        if why is not None:
            self.report.leave(name, _full_name(cls), why)

    def _ours(self) -> list[Any]:
        return [attend, _gelu, *(self.hugging_face.FORWARDS if self.hugging_face is not None else ())]

    def _change(self, module: torch.nn.Module) -> tuple[tuple[str, ...], Callable[[], Any], str] | None:
        """The kinds of swap that it takes, how it is done and what it is then called; None if it is none of ours."""
        cls: Any = type(module)
        if twin := TWINS.get(cls):
            needs = _NEEDS.get(cls, ("norms", "attention"))
            return needs, (lambda: ClassChange(module, twin)), f"torchweld.nn.{twin.__name__}"
        if cls is torch.nn.GELU and getattr(module, "approximate", None) == "tanh":
            return ("activations",), (lambda: ForwardChange(module, _gelu)), "torchweld.ops.gelu"
        if self.hugging_face is not None and (known := self.hugging_face.recognise(cls)):
            kind, forward, now = known
            return (kind,), (lambda: ForwardChange(module, forward)), now
        if calls_attention(cls):
            now = "its attention: torchweld.ops.scaled_dot_product_attention"
            return ("attention",), (lambda: ForwardChange(module, attend)), now
        return None


def patch(model: torch.nn.Module, *, norms: bool = True, attention: bool = True, activations: bool = True) -> Report:
    """Swaps the layers of a model for the drop-ins, in place: the same modules, parameters, hooks and state_dict.

    LayerNorm, RMSNorm, MultiheadAttention and the Transformer layers of torch.nn; modules that call
    `torch.nn.functional.scaled_dot_product_attention`; tanh GELU; the attention, norms and GELU of Hugging Face
    transformers. Optimizers, tied weights and checkpoints are not touched by it. Only exact classes are swapped, and
    only what has kernels on the model's device.

    Args:
        model: any module, in training or not.
        norms, attention, activations: what to swap; the Transformer layers need both of the first.

    Returns:
        A report that prints as a table: what was swapped, what was left and why. `report.undo()` takes it back.

    Raises:
        TypeError: `model` is no torch.nn.Module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"[patch] model: expected a torch.nn.Module, but got {type(model).__name__}")
    return _Walk(model, {"norms": norms, "attention": attention, "activations": activations}).run()
