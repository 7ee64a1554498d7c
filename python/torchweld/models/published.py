"""What the models share: weights in the layout that `transformers` publishes, and the groups of an optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchweld.errors import UserError


class Published(nn.Module):
    """A model that `transformers` has too: its weights go there and back.

    Attributes:
        config: a dataclass with `from_hugging_face` and `to_hugging_face`, the contents of `config.json`.
        title: what error messages call it.
        prefix: of the parameter names in a checkpoint of the whole model; the bare one lacks it.
        ignored: ends of names of stored tensors that are no parameters.
        tied: names of stored tensors that are one of the parameters once more, and the name of that.
    """

    title: ClassVar[str]
    prefix: ClassVar[str] = ""
    ignored: ClassVar[tuple[str, ...]] = ()
    tied: ClassVar[Mapping[str, str]] = {}
    config: Any

    def published_names(self, name: str) -> list[str]:
        """The published names, without `prefix`, of what the parameter `name` holds one after another."""
        return [name]

    def published(self) -> dict[str, Tensor]:
        """The parameters by their published names, without `prefix`, in the published layout."""
        stored: dict[str, Tensor] = {}
        for name, p in self.state_dict().items():
            names = self.published_names(name)
            stored |= zip(names, p.detach().chunk(len(names)) if len(names) > 1 else [p.detach()], strict=True)
        return stored

    def load_published(self, stored: Mapping[str, Tensor]) -> None:
        """The inverse of `published`; names and shapes are right."""
        own = {name: [stored[part] for part in self.published_names(name)] for name in self.state_dict()}
        self.load_state_dict({name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in own.items()})

    def to_hugging_face(self) -> dict[str, Tensor]:
        """The state_dict that `transformers` and `load_hugging_face` read; tensors share memory where they can."""
        return {self.prefix + name: tensor for name, tensor in self.published().items()}

    def load_hugging_face(self, state: Mapping[str, Tensor]) -> None:
        """Loads the state_dict of the same model of `transformers`, or of a published checkpoint.

        Raises:
            UserError: a parameter is missing, unknown or of another shape.
        """
        stored = {_modern(name.removeprefix(self.prefix)): tensor for name, tensor in state.items()}
        stored = {name: tensor for name, tensor in stored.items() if not name.endswith(self.ignored)}
        twins = {name: stored.pop(name) for name in self.tied if name in stored}
        with torch.no_grad():
            check_tensors(self.title, self.published(), stored)
        for name, twin in twins.items():
            if not torch.equal(twin, stored[self.tied[name]]):
                raise UserError(f"{self.title} weights: {name}: expected it tied to {self.tied[name]}, but it differs")
        self.load_published(stored)

    def check_whole(self, op: str) -> None:
        """Raises UserError where parameters are spread over processes, which `op` knows nothing of."""
        if any(hasattr(p, "placements") for p in self.parameters()):
            raise UserError(
                f"{op}: model: expected parameters that are plain tensors, but got DTensors; load its checkpoint in "
                f"one process"
            )

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """For an optimizer: matrices and embeddings decay, biases and norms do not."""
        decayed = [p for p in self.parameters() if p.dim() > 1]
        others = [p for p in self.parameters() if p.dim() <= 1]
        return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _modern(name: str) -> str:
    """Checkpoints that were made with TensorFlow have other names for the parameters of a norm."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def check_tensors(title: str, expected: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    """Raises UserError unless `stored` has the names and the shapes of `expected`."""
    if missing := sorted(expected.keys() - stored.keys()):
        raise UserError(f"{title} weights: expected {len(expected)} tensors, but {missing[0]!r} is missing")
    if unknown := sorted(stored.keys() - expected.keys()):
        raise UserError(f"{title} weights: expected {len(expected)} tensors, but {unknown[0]!r} is not one of them")
    for name, tensor in expected.items():
        if stored[name].shape != tensor.shape:
            raise UserError(
                f"{title} weights: {name}: expected shape {list(tensor.shape)}, but got {list(stored[name].shape)}; "
                f"the config belongs to another model"
            )


def check_config(title: str, values: Mapping[str, Any], expected: Mapping[str, list[Any]], names: list[str]) -> None:
    """Raises UserError unless `config.json` has one of the values `expected` of each key, and all of `names`."""
    for name, allowed in expected.items():
        if (got := values.get(name)) not in allowed:
            raise UserError(f"config.json: {name}: expected {allowed[0]!r} (a {title}), but got {got!r}")
    if missing := [name for name in names if name not in values]:
        raise UserError(f"config.json: expected the keys {', '.join(names)}, but {', '.join(missing)} is missing")


def check_sizes(config: object, names: list[str]) -> None:
    """Raises UserError unless the fields `names` of a config are positive whole numbers."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{type(config).__name__}: {name}: expected a positive whole number, but got {value!r}")


def check_heads(config: object, width: str, heads: str) -> None:
    """Raises UserError unless the field `heads` of a config divides `width`, and its dropout is in [0, 1)."""
    name, n, parts, dropout = type(config).__name__, *(getattr(config, f) for f in (width, heads, "dropout"))
    if n % parts:
        raise UserError(f"{name}: expected {width} divisible by {heads}, but got {n} and {parts}")
    if not 0.0 <= dropout < 1.0:
        raise UserError(f"{name}: dropout: expected a number in [0, 1), but got {dropout!r}")
