"""Cases of linear_cross_entropy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from torchweld import ops, reference
from torchweld.testing.case import Case, Tensors
from torchweld.testing.inputs import Random

_IGNORE = -100


@dataclass(frozen=True, kw_only=True)
class LinearCrossEntropyCase(Case):
    """`rows`: the shape of the target. `ignored`: the share of rows without one. `scale`: about that of the logits.

    `wide_weight`: weight and bias are float32, whatever the input's dtype. `wanted`: what is differentiated.
    """

    rows: tuple[int, ...]
    features: int
    classes: int
    bias: bool = False
    reduction: str = "mean"
    smoothing: float = 0.0
    softcap: float | None = None
    z_loss: float = 0.0
    shift: bool = False
    ignored: float = 0.0
    layout: str = "contiguous"
    scale: float = 2.0
    wide_weight: bool = False
    wanted: tuple[str, ...] = ("input", "weight", "bias")

    @property
    def op(self) -> str:
        return "linear_cross_entropy"

    @property
    def leaves(self) -> tuple[str, ...]:
        return tuple(name for name in self.wanted if self.bias or name != "bias")

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Tensors:
        random = Random(seed, device)
        wide = torch.float32 if self.wide_weight else dtype
        scale = self.scale / self.features**0.5
        x = {
            "input": random.normal(*self.rows, self.features, dtype=dtype, layout=self.layout),
            "weight": random.normal(self.classes, self.features, dtype=wide, scale=scale, layout=self.layout),
        }
        if self.bias:
            x["bias"] = random.normal(self.classes, dtype=wide)
        target = (torch.rand(self.rows, generator=random.generator, device=device) * self.classes).long()
        target.clamp_(max=self.classes - 1).masked_fill_(random.chance(*self.rows, probability=self.ignored), _IGNORE)
        target.flatten()[: 2 if self.shift else 1] = 0  # at least one row counts
        rows = (*self.rows[:-1], self.rows[-1] - self.shift) if self.reduction == "none" else ()
        return x | {"target": target, "doutput": random.normal(*rows, dtype=wide)}

    def ours(self, x: Tensors) -> Tensors:
        return {"output": self._call(ops.linear_cross_entropy, x)}

    def reference(self, x: Tensors) -> Tensors:
        return {"output": self._call(reference.linear_cross_entropy, x)}

    def torch(self, x: Tensors) -> Tensors:
        """As one would write it: the logits of all rows, and torch's cross_entropy of them."""
        input, target = x["input"], x["target"]
        if self.shift:
            input, target = input[..., :-1, :], target[..., 1:]
        logits = F.linear(input.to(x["weight"].dtype), x["weight"], x.get("bias")).flatten(0, -2)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        rows = target.flatten()
        loss = F.cross_entropy(
            logits, rows, ignore_index=_IGNORE, reduction=self.reduction, label_smoothing=self.smoothing
        )
        if self.z_loss:
            squares = logits.logsumexp(-1).square() * (rows != _IGNORE)
            if self.reduction != "none":
                squares = squares.sum() / ((rows != _IGNORE).sum() if self.reduction == "mean" else 1)
            loss = loss + self.z_loss * squares
        return {"output": loss.view(target.shape) if self.reduction == "none" else loss}

    def terms(self, x: Tensors) -> Mapping[str, Tensor | float]:
        """Of the gradients of weight and bias, sums over rows, the size of a random walk with those steps.

        With a class or a feature or two the sum can be far smaller than what was added up. And what a probability moves
        by where the logits are rounded: P_j * ((1 - P_j) d_j - sum over the other k of P_k d_k), as in attention. The
        rounding of a logit's partial sums, which grow as a random walk, is one with steps of about a fifth of an ulp.
        Under a softcap also what its slope is rounded by, two ulps of 1, ten roundings of products with it, and what
        the slope changes where the logit is rounded, a sum over the features.
        """
        rows, features = x["target"].flatten(), x["input"].flatten(0, -2)
        bias = x.get("bias", torch.zeros(self.classes, dtype=torch.float64, device=features.device))
        logits = torch.addmm(bias, features, x["weight"].T)
        t = torch.zeros_like(logits) if self.softcap is None else torch.tanh(logits / self.softcap)
        capped = (logits if self.softcap is None else self.softcap * t).requires_grad_()
        with torch.enable_grad():
            loss = reference.cross_entropy(capped, rows, None, _IGNORE, "none", self.smoothing)
            loss = loss + self.z_loss * capped.logsumexp(-1).square() * (rows != _IGNORE)
            (dcapped,) = torch.autograd.grad(loss.sum(), capped)
        counted = max(int((rows != _IGNORE).sum()), 1) if self.reduction == "mean" else 1
        dcapped = dcapped.abs() * float(x["doutput"].abs().amax()) / counted
        steps = dcapped * (1 - t.square())
        sizes = torch.sqrt(features.square() @ x["weight"].square().T)
        rounding = 0.15 * self.features**0.5 * sizes
        shares = capped.detach().softmax(-1)
        each = shares * rounding * (1 - t.square())
        moved = shares * (rounding * (1 - shares) * (1 - t.square()) + each.sum(-1, keepdim=True) - each)
        moved = moved * (rows != _IGNORE).unsqueeze(-1) * float(x["doutput"].abs().amax()) / counted
        squares = steps.square() + moved.square()
        found = {
            "dweight": torch.sqrt(squares.T @ features.square()).amax(),
            "dbias": squares.sum(0).sqrt().amax(),
            "dinput": torch.sqrt(moved.square() @ x["weight"].square()).amax(),
        }
        if self.softcap is not None:
            rounded = 2 * dcapped + (5 + 0.6 / self.softcap * self.features**0.5 * sizes) * steps
            found["dinput"] = (rounded @ x["weight"].abs()).amax()
            found["dweight"] += (rounded.T @ features.abs()).amax()
            found["dbias"] += rounded.sum(0).amax()
        return {n: float(value) for n, value in found.items()}

    def zeros(self, x: Tensors) -> Tensors:
        """A row without a target has no loss and no gradient; nor has one of a single class, whose probability is 1."""
        if self.z_loss:
            return {}
        one_class = torch.full_like(x["target"], self.classes == 1, dtype=torch.bool)
        blank = one_class | (x["target"] == _IGNORE)
        counted = blank[..., 1:] if self.shift else blank
        last = torch.ones_like(blank[..., :1])
        found = {"dinput": (torch.cat([counted, last], -1) if self.shift else blank).unsqueeze(-1)}
        found |= {"output": counted} if self.reduction == "none" else {}
        return found | ({"dweight": one_class.any(), "dbias": one_class.any()} if self.classes == 1 else {})

    def _call(self, function, x: Tensors) -> Tensor:  # type: ignore[no-untyped-def]
        return function(
            x["input"],
            x["weight"],
            x["target"],
            x.get("bias"),
            ignore_index=_IGNORE,
            label_smoothing=self.smoothing,
            reduction=self.reduction,
            softcap=self.softcap,
            z_loss=self.z_loss,
            shift=self.shift,
        )


def _case(name: str, regime: str, rows: int | tuple[int, ...], features: int, classes: int, **flags: object) -> Case:
    shape = (rows,) if isinstance(rows, int) else rows
    return LinearCrossEntropyCase(name=name, regime=regime, rows=shape, features=features, classes=classes, **flags)  # type: ignore[arg-type]


LINEAR_CROSS_ENTROPY = (
    _case("48 x 64 x 128", "whole vectors and tiles", 48, 64, 128),
    _case("1 x 1 x 1", "one class: the loss is 0", 1, 1, 1),
    _case("5 x 3 x 2", "less than a vector everywhere", 5, 3, 2, bias=True),
    _case("67 x 33 x 517", "a tail in every dimension, blocks of classes", 67, 33, 517, bias=True),
    _case("1100 x 20 x 70", "chunks of rows, few classes", 1100, 20, 70, bias=True),
    _case("600 x 65 x 2100", "chunks of rows, many blocks, several threads", 600, 65, 2100),
    _case("9 x 16 x 50257", "GPT-2's vocabulary", 9, 16, 50257),
    _case("40 x 300 x 100", "more features than steps in a chain", 40, 300, 100),
    _case("33 x 24 x 100 sum", "summed", 33, 24, 100, reduction="sum"),
    _case("530 x 24 x 100 none", "a loss for each row: the backward makes the logits again", 530, 24, 100,
          reduction="none", bias=True),
    _case("33 x 24 x 100 smoothed", "label smoothing", 33, 24, 100, smoothing=0.1),
    _case("33 x 24 x 100 all smooth", "nothing but smoothing", 33, 24, 700, smoothing=1.0, bias=True),
    _case("33 x 24 x 300 capped", "softcap", 33, 24, 300, softcap=3.0, bias=True),
    _case("33 x 24 x 300 capped, smoothed", "softcap and smoothing", 33, 24, 300, softcap=1.5, smoothing=0.3),
    _case("33 x 24 x 300 z", "z loss", 33, 24, 300, z_loss=0.01, reduction="none"),
    _case("600 x 24 x 100 ignored", "rows without a target, chunks without those", 600, 24, 100, ignored=0.5),
    _case("33 x 24 x 100 ignored none", "rows without a target, each row", 33, 24, 100, ignored=0.5, reduction="none"),
    _case("3 x 11 x 24 x 100 shifted", "a causal model's own tokens", (3, 11), 24, 100, shift=True, ignored=0.2),
    _case("3 x 11 x 24 x 100 shifted none", "the same for each row", (3, 11), 24, 100, shift=True, reduction="none"),
    _case("33 x 24 x 100 of 50", "one class takes nearly all", 33, 24, 100, scale=50.0),
    _case("33 x 24 x 100 strided", "non-contiguous, NaN between the elements", 33, 24, 100, layout="strided"),
    _case("40 x 24 x 100 transposed", "non-contiguous, columns first", 40, 24, 100, layout="transposed"),
    _case("33 x 24 x 100 mixed", "a float32 head", 33, 24, 100, wide_weight=True, bias=True),
    _case("33 x 24 x 100 weight alone", "no gradient of input", 33, 24, 100, bias=True, wanted=("weight", "bias")),
    _case("33 x 24 x 100 input alone", "a frozen head", 33, 24, 100, bias=True, wanted=("input",)),
)  # fmt: skip
