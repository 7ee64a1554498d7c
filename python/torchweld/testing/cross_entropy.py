"""Cases of cross_entropy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchweld import ops, reference
from torchweld.testing.case import Case, Tensors
from torchweld.testing.inputs import Random, shape_values

_IGNORE = -100


@dataclass(frozen=True, kw_only=True)
class CrossEntropyCase(Case):
    """`ignored`: the share of rows without a target; `masked`: the share of logits that are -inf.

    `weight` and `soft`: the dtypes of class weights and of class probabilities as target. `inner`: dimensions behind
    the classes. `values`: see `inputs.VALUES`.
    """

    rows: int
    classes: int
    reduction: str = "mean"
    smoothing: float = 0.0
    ignored: float = 0.0
    masked: float = 0.0
    layout: str = "contiguous"
    scale: float = 2.0
    shift: float = 0.0
    values: str = "normal"
    weight: torch.dtype | None = None
    soft: torch.dtype | None = None
    inner: tuple[int, ...] = ()

    @property
    def op(self) -> str:
        return "cross_entropy"

    @property
    def leaves(self) -> tuple[str, ...]:
        return ("logits",)

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Tensors:
        random = Random(seed, device)
        size, rows = (self.rows, self.classes, *self.inner), (self.rows, *self.inner)
        logits = random.normal(*size, dtype=dtype, scale=self.scale, shift=self.shift, layout=self.layout)
        logits = shape_values(logits, self.values)
        target = (torch.rand(rows, generator=random.generator, device=device) * self.classes).long()
        target.clamp_(max=self.classes - 1)
        mask = random.chance(*size, probability=self.masked)
        logits.masked_fill_(mask.scatter(1, target.unsqueeze(1), False), float("-inf"))
        target.masked_fill_(random.chance(*rows, probability=self.ignored), _IGNORE)
        target[:1] = 0
        x = {
            "logits": logits,
            "target": target,
            "doutput": random.normal(*(() if self.reduction != "none" else rows), dtype=dtype),
        }
        if self.soft is not None:
            x["target"] = random.normal(*size).softmax(1).to(self.soft)
        if self.weight is not None:
            x["weight"] = random.normal(self.classes).abs().add(0.1).to(self.weight)
        return x

    def ours(self, x: Tensors) -> Tensors:
        return {"output": self._call(ops.cross_entropy, x)}

    def torch(self, x: Tensors) -> Tensors:
        return {"output": self._call(torch.nn.functional.cross_entropy, x)}

    def reference(self, x: Tensors) -> Tensors:
        return {"output": self._call(reference.cross_entropy, x)}

    def zeros(self, x: Tensors) -> Tensors:
        """No loss and no gradient: in rows without a target, and in rows of one class, whose probability is 1."""
        if self.soft is not None:
            return {}
        blank = x["target"] == _IGNORE if self.classes > 1 else torch.ones_like(x["target"], dtype=torch.bool)
        found = {"dlogits": blank.unsqueeze(1)}
        return found | ({"output": blank} if self.reduction == "none" else {})

    def _call(self, function, x: Tensors) -> Tensor:  # type: ignore[no-untyped-def]
        options = {"ignore_index": _IGNORE, "reduction": self.reduction, "label_smoothing": self.smoothing}
        return function(x["logits"], x["target"], x.get("weight"), **options)


def _case(name: str, regime: str, rows: int, classes: int, **flags: object) -> Case:
    return CrossEntropyCase(name=name, regime=regime, rows=rows, classes=classes, **flags)  # type: ignore[arg-type]


CROSS_ENTROPY = (
    _case("16 x 64", "whole vectors", 16, 64),
    _case("1 x 1", "one class: the loss is 0", 1, 1),
    _case("33 x 2", "two classes", 33, 2),
    _case("33 x 10", "less than one vector", 33, 10),
    _case("7 x 1009", "prime: vectors and a tail", 7, 1009),
    _case("5 x 50257", "GPT-2's vocabulary: a row longer than the first-level cache", 5, 50257),
    _case("700 x 1024", "several threads", 700, 1024),
    _case("33 x 100 sum", "summed", 33, 100, reduction="sum"),
    _case("33 x 100 none", "a loss for each row", 33, 100, reduction="none"),
    _case("33 x 100 smoothed", "label smoothing", 33, 100, smoothing=0.1),
    _case("33 x 100 all smooth", "nothing but smoothing, each row", 33, 100, smoothing=1.0, reduction="none"),
    _case("33 x 100 ignored", "rows without a target", 33, 100, ignored=0.5),
    _case("33 x 100 ignored none", "rows without a target, each row", 33, 100, ignored=0.5, reduction="none"),
    _case("33 x 100 masked", "classes of probability 0", 33, 100, masked=0.3, reduction="none"),
    _case("33 x 100 + 1e4", "logits far from zero", 33, 100, shift=1e4),
    _case("33 x 100 of 1e4", "one class takes all", 33, 100, scale=1e4, reduction="none"),
    _case("9 x 100 unaligned", "no vector at an aligned address", 9, 100, layout="unaligned"),
    _case("9 x 100 strided", "non-contiguous, NaN between the elements", 9, 100, layout="strided"),
    _case("40 x 100 transposed", "non-contiguous, columns first", 40, 100, layout="transposed"),
)
