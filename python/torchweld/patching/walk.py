"""patch(model): walks the modules of a model, swaps those with a drop-in, and reports why it left the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ref

import torch

from torchweld import backend
from torchweld.nn.twins import TWINS
from torchweld.ops._arguments import flag
from torchweld.patching.changes import Change, ClassChange
from torchweld.patching.drop_ins import DropIn, find, hugging_face
from torchweld.patching.report import Entry, Report
from torchweld.patching.subclasses import Swapped
from torchweld.patching.tune import example_call
from torchweld.patching.tune import tune as tuned

# The functions of the compiled modules that each kind of swap needs.
_KERNELS = {
    "norms": "layer_norm_forward",
    "attention": "attention_forward",
    "activations": "gelu_forward",
    "mlp": "gated_forward",
    "dropout": "dropout",
    "rope": "rotary_embedding",
    "loss": "linear_cross_entropy",
}
_ADVICE = "One line more: torchweld.keep_memory(), first in a program that trains on a CPU."


def _full_name(cls: type) -> str:
    """The name of a class with its module."""
    module = str(cls.__module__)
    for package in ("torch.nn", "torchweld.nn", "transformers"):
        if module.startswith(package + "."):
            module = package
    return cls.__name__ if module == "__main__" else f"{module}.{cls.__name__}"


def _why_left(cls: type[torch.nn.Module]) -> str | None:
    """Why a module that is not of a stock class stays as it is; None for a class without a drop-in."""
    base = next((b for b in TWINS if issubclass(cls, b)), None)
    module, name = str(cls.__module__), cls.__name__.lower()
    named = "norm" in name or "attention" in name
    if module.startswith("torch.ao.") and (base or named):
        return "a quantised layer"
    if base is not None:
        own = cls.forward is not base.forward
        return f"a subclass of torch.nn.{base.__name__}" + (" with a forward of its own" if own else "")
    if named and not module.startswith("transformers."):
        return "an unknown layer: torchweld has no drop-in for it"
    if "norm" in name:
        return "an unknown layer: none of the norms that torchweld knows"
    return None


def _error(e: Exception) -> str:
    return f"it cannot be swapped: {type(e).__name__}: {str(e)[:100]}"


class _Walk:
    """One call of `patch`."""

    def __init__(self, model: torch.nn.Module, asked: dict[str, bool]) -> None:
        self.kind = next((p.device.type for p in model.parameters()), "cpu")
        advice = _ADVICE if self.kind == "cpu" else ""
        self.model, self.report, self.hugging_face = model, Report(ref(model), advice=advice), hugging_face()
        self.not_now = {kind: self._why_not(kind, wanted) for kind, wanted in asked.items()}
        self.found: dict[type, DropIn | None] = {}
        self.done: set[int] = set()  # modules inside another that is swapped as a whole
        self.pretrained: set[int] = set()

    def _why_not(self, kind: str, wanted: bool) -> str | None:
        """Why no module of a kind is swapped: not asked for, or no kernels, and the reference is slower than torch."""
        if not wanted:
            return f"patch(..., {kind}=False)"
        if self.kind == "meta" or hasattr(backend.kernels.get(self.kind), _KERNELS[kind]):
            return None
        return f"there are no kernels for {kind} on {self.kind!r}"

    def run(self) -> Report:
        try:
            for name, module in self.model.named_modules():
                self._module(name, module)
        except BaseException:
            self.report.undo()  # all or nothing
            raise
        return self.report

    def _module(self, name: str, module: torch.nn.Module) -> None:
        if id(module) in self.done:
            return
        if issubclass(type(module), torch.jit.ScriptModule):
            self.report.leave(name, getattr(module, "original_name", type(module).__name__), "compiled by torch.jit")
            self.done |= {id(m) for m in module.modules()}
            return
        if self.hugging_face is not None and id(module) not in self.pretrained:
            self._pretrained(name, module)
        self._visit(name, module)

    def _swap(self, entry: Entry, make: Callable[[], Change]) -> None:
        """Makes a change. A module that cannot be changed is left as it was."""
        try:
            self.report.swap(entry, make)
        except Exception as e:  # a class of another library may raise anything
            self.report.leave(entry.name, entry.was, _error(e))

    def _pretrained(self, name: str, module: torch.nn.Module) -> None:
        found = self.hugging_face.attention_of(module)
        if found is None:
            return
        self.pretrained |= {id(m) for m in module.modules()}
        was, why = found
        if why := why or self.not_now["attention"]:
            self.report.leave(name, was, why)
        else:
            entry = Entry(name, was, "torchweld attention")
            self._swap(entry, lambda: self.hugging_face.AttentionChange(module))

    def _visit(self, name: str, module: torch.nn.Module) -> None:
        cls = type(module)
        was = _full_name(cls)
        if cls in TWINS.values() or issubclass(cls, Swapped):
            self.report.leave(name, was, "already torchweld's")
            return
        try:
            found = self._find(module)
        except Exception as e:
            self.report.leave(name, was, _error(e))
            return
        if found is None:
            why = _why_left(cls)
        elif "forward" in vars(module):
            why = "its forward was replaced on the instance"
        else:
            why = next((reason for kind in found.needs if (reason := self.not_now[kind])), None)
            why = why or found.why_not(module)
            if why is None:
                self._swap(Entry(name, was, found.now), lambda: ClassChange(module, found.make()))
        if why is not None:
            self.report.leave(name, was, why)

    def _find(self, module: torch.nn.Module) -> DropIn | None:
        cls = type(module)
        if issubclass(cls, torch.fx.GraphModule):  # it makes a class for each instance
            return None
        if cls not in self.found:
            self.found[cls] = find(cls)
        return self.found[cls]


def patch(
    model: torch.nn.Module,
    *,
    norms: bool = True,
    attention: bool = True,
    activations: bool = True,
    mlp: bool = True,
    rope: bool = True,
    loss: bool = True,
    dropout: bool = True,
    tune: bool | str = False,
    example_inputs: Any = None,
) -> Report:
    """Swaps the layers of a model for the drop-ins, in place: the same modules, parameters, hooks and state_dict.

    Swapped are LayerNorm, RMSNorm, MultiheadAttention and the Transformer layers of torch.nn; modules that call
    `torch.nn.functional.scaled_dot_product_attention`; GELU and Dropout; the attention, norms, GELU, gated MLPs, rotary
    embeddings and losses over a vocabulary of Hugging Face transformers; dropout, residual add and norm of BERT-like
    blocks, which become one op. Subclasses are not swapped, and neither is a layer without kernels on the model's
    device. Optimizers, tied weights and checkpoints stay valid.

    A module that cannot be swapped is left, and the report gives the reason. If `patch` itself raises, the model is
    unchanged. Copies, pickles and replicas of a patched model are patched. `torch.compile` compiles the calls of
    `scaled_dot_product_attention` in a model's own code as torch's, and rotary embeddings as the model has them.

    Args:
        model: any module, in training or not.
        norms, attention, activations: the kinds to swap. The Transformer layers need norms and attention. Residual adds
            are of the norms' kind.
        mlp: the product of activation and gate becomes one op in gated MLPs (Llama, Mistral, Qwen, Gemma, Phi-3,
            Mixtral, T5, ModernBERT).
        rope: rotary embeddings of queries and keys.
        loss: in training calls with labels, language models of transformers make their loss from the input of their
            output layer. The logits of the result are made when something reads them.
        dropout: Dropout keeps the seed of its mask in place of the mask, which is another than torch's. In place, and
            with hooks, it is left.
        tune: "training" or "inference", or True for what the model is set to: every kind of swap is timed on what the
            modules get when the model is called with `example_inputs`, forward, and in training backward too. A swap
            that is slower than what it replaces is taken back; the report has both times. It takes about a tenth of a
            second for each class of module and shape, and is valid for these shapes on this machine.
        example_inputs: a tensor, a sequence of arguments or a mapping of named ones, for one call of the model.

    Returns:
        A report that prints as a table: what was swapped, what was left and why. `report.undo()` takes the swaps back.
        The report does not keep the model alive.

    Raises:
        TypeError: `model` is not a torch.nn.Module, or another argument has another type.
        ValueError: `tune` without `example_inputs`, or another string.
    """
    if not issubclass(type(model), torch.nn.Module):
        raise TypeError(f"[patch] model: expected a torch.nn.Module, but got {type(model).__name__}")
    wanted = {
        "norms": norms,
        "attention": attention,
        "activations": activations,
        "mlp": mlp,
        "rope": rope,
        "loss": loss,
        "dropout": dropout,
    }
    asked = {name: flag("patch", name, value) for name, value in wanted.items()}
    if isinstance(tune, str) and tune not in ("training", "inference"):
        raise ValueError(f"[patch] tune: expected 'training', 'inference' or a bool, but got {tune!r}")
    wants_times = isinstance(tune, str) or flag("patch", "tune", tune)
    if wants_times and example_inputs is None:
        raise ValueError("[patch] example_inputs: expected the inputs of one call, beside tune, but got None")
    call = example_call(example_inputs) if wants_times else None
    report = _Walk(model, asked).run()
    try:
        if call is not None:
            tuned(model, report, call, model.training if isinstance(tune, bool) else tune == "training")
    except BaseException:
        report.undo()  # all or nothing
        raise
    report.close()
    return report
