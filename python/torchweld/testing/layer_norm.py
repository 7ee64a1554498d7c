"""Cases of layer_norm, rms_norm and their add_ forms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from torchweld import ops, reference
from torchweld.reference.philox import dropout_factors
from torchweld.testing.case import Case, Tensors
from torchweld.testing.inputs import Random, shape_values

EPS = 1e-5
_WIDE = torch.float32


@dataclass(frozen=True, kw_only=True)
class LayerNormCase(Case):
    """`rows` rows of `shape` elements, `values` of `inputs.VALUES`.

    `add`: with a residual in front; `rms`: rms_norm, without a bias.
    """

    rows: tuple[int, ...]
    shape: tuple[int, ...]
    weight: bool = True
    bias: bool = True
    weight_dtype: torch.dtype | None = None
    layout: str = "contiguous"
    scale: float = 1.0
    shift: float = 0.0
    values: str = "normal"
    eps: float = EPS
    huge_row: bool = False
    add: bool = False
    rms: bool = False
    zero_centered: bool = False
    residual_dtype: torch.dtype | None = None
    dropout_p: float = 0.0

    @property
    def op(self) -> str:
        return ("add_" if self.add else "") + ("rms_norm" if self.rms else "layer_norm")

    @property
    def leaves(self) -> tuple[str, ...]:
        return ("x", "residual", "weight", "bias")

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Tensors:
        random, full = Random(seed, device), (*self.rows, *self.shape)

        def activations(scale: float = 1.0, shift: float = 0.0, dtype: torch.dtype = dtype) -> Tensor:
            return random.normal(*full, dtype=dtype, scale=scale, shift=shift, layout=self.layout)

        x = {"x": shape_values(activations(self.scale, self.shift), self.values), "doutput": activations()}
        if self.huge_row:
            x["x"][-1:] *= 1e4
        if self.add:
            wide = self.residual_dtype or dtype
            x |= {"residual": activations(self.scale, dtype=wide), "dsum": activations(dtype=wide)}
        if self.dropout_p > 0:
            x["seed"] = torch.tensor([0x1234567890ABCDEF + seed], device=x["x"].device)
        if self.add:
            x["rounding"] = self._rounding(x)
        # Parameters are always contiguous in a model, but may start anywhere.
        layout = "unaligned" if self.layout == "unaligned" else "contiguous"
        one = 0.0 if self.zero_centered else 1.0
        for name, wanted, shift in (("weight", self.weight, one), ("bias", self.bias and not self.rms, 0.0)):
            if wanted:
                x[name] = random.normal(
                    *self.shape, dtype=self.weight_dtype or dtype, scale=0.5, shift=shift, layout=layout
                )
        return x

    def _rounding(self, x: Tensors) -> Tensor:
        """The rounding of the stored sum, the input of the norm: its difference from the exact sum, in float64."""
        exact = self._sum(x, torch.float64)
        return torch.where(exact.isfinite(), exact.to(x["residual"].dtype) - exact, 0.0)

    def ours(self, x: Tensors) -> Tensors:
        return self._call(ops, x)

    def reference(self, x: Tensors) -> Tensors:
        if self.add and x["residual"].dtype is torch.float64:
            x = x | {"residual": x["residual"] + x["rounding"]}
        return self._call(reference, x)

    def _call(self, module: ModuleType, x: Tensors) -> Tensors:
        inputs = [x["x"], x["residual"]] if self.add else [x["x"]]
        parameters = [x.get("weight")] if self.rms else [x.get("weight"), x.get("bias")]
        options = {"dropout_p": self.dropout_p, "seed": x.get("seed")} if self.add else {}
        if self.rms:
            options["zero_centered_weight"] = self.zero_centered
        found = getattr(module, self.op)(*inputs, self.shape, *parameters, self.eps, **options)
        return {"output": found[0], "sum": found[1]} if self.add else {"output": found}

    def _sum(self, x: Tensors, dtype: torch.dtype) -> Tensor:
        """residual + dropout(x), x in `dtype`, as torch computes it. torch gets the mask, for it takes no seed."""
        added = x["x"].to(dtype)
        if self.dropout_p > 0:
            cols = max(math.prod(self.shape), 1)
            factors = dropout_factors(x["seed"], added.numel() // cols, cols, self.dropout_p)
            added = added * factors.view(added.shape).to(dtype)
        return x["residual"] + added

    def torch(self, x: Tensors) -> Tensors:
        total = self._sum(x, x["x"].dtype) if self.add else x["x"]
        parameters = [x.get("weight"), x.get("bias")]
        # torch refuses some pairs of dtypes; with those, and with 1 + weight, its user would compute in float32.
        same = all(p is None or p.dtype == total.dtype for p in parameters) and not self.zero_centered
        compute = total.dtype if same else torch.promote_types(total.dtype, torch.float32)
        weight, bias = (None if p is None else p.to(compute) for p in parameters)
        if weight is not None and self.zero_centered:
            weight = weight + 1
        if self.rms:
            output = torch.nn.functional.rms_norm(total.to(compute), list(self.shape), weight, self.eps)
        else:
            output = torch.nn.functional.layer_norm(total.to(compute), list(self.shape), weight, bias, self.eps)
        output = output.to(x["x"].dtype)
        return {"output": output, "sum": total} if self.add else {"output": output}

    def terms(self, x: Tensors) -> Mapping[str, Tensor | float]:
        """With g = doutput * weight: of dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) the size of the first term,
        and of the last, which is nothing where a single column is centred.

        Of the weight gradients, sums over rows, the size of a random walk with those steps: with a column or two the
        sum can be far smaller than what was added up.
        """
        total = self._sum(x, torch.float64) + x["rounding"] if self.add else x["x"]
        if total.numel() == 0:
            return {}
        dims = tuple(range(-len(self.shape), 0))
        centred = total if self.rms else total - total.mean(dims, keepdim=True)
        rstd = torch.rsqrt(centred.square().mean(dims, keepdim=True) + self.eps)

        def walk(steps: Tensor) -> float:
            return float(steps.flatten(0, len(self.rows) - 1).norm(dim=0).amax())

        g = x["doutput"] * (x.get("weight", 1.0) + (1.0 if self.zero_centered else 0.0))
        last = centred * rstd * (g * centred * rstd).mean(dims, keepdim=True)
        dx = float((rstd * (g.abs() + last.abs())).amax())
        return {
            "dx": dx,
            "dresidual": dx,
            "dweight": walk(x["doutput"] * centred * rstd),
            "dbias": walk(x["doutput"]),
        }

    def zeros(self, x: Tensors) -> Tensors:
        """The only column of a row is the mean of the row, so it has no gradient but that of the sum."""
        only = math.prod(self.shape) == 1 and not self.rms and not self.add
        return {"dx": torch.ones((), dtype=torch.bool, device=x["x"].device)} if only else {}


def _case(
    name: str, regime: str, rows: int | tuple[int, ...], cols: int | tuple[int, ...], **flags: object
) -> LayerNormCase:
    as_tuple = [n if isinstance(n, tuple) else (n,) for n in (rows, cols)]
    return LayerNormCase(name=name, regime=regime, rows=as_tuple[0], shape=as_tuple[1], **flags)  # type: ignore[arg-type]


LAYER_NORM = (
    _case("8 x 64", "a few whole vectors", 8, 64),
    _case("1 x 1", "one element", 1, 1),
    _case("5 x 1", "one column: dx is 0, all of it cancels", 5, 1),
    _case("301 x 2", "two columns: dx nearly cancels", 301, 2, scale=0.01),
    _case("301 x 7", "less than one vector", 301, 7),
    _case("6 x 33", "vectors and a tail of one", 6, 33),
    _case("7 x 1009", "prime, odd number of rows", 7, 1009),
    _case("2 x 5 x 768", "batch dimensions, GPT-2's width", (2, 5), 768),
    _case("4 x (3, 5, 8)", "three normalised dimensions", 4, (3, 5, 8)),
    _case("2111 x 96", "every row block of the weight gradients, the last one ragged", 2111, 96),
    _case("3 x 65537", "a row longer than the first-level cache", 3, 65537),
    _case("0 x 64", "no rows", 0, 64),
    _case("4 x 0", "rows of nothing", 4, 0),
    _case("9 x 100 unaligned", "no vector at an aligned address", 9, 100, layout="unaligned"),
    _case("9 x 100 strided", "non-contiguous, NaN between the elements", 9, 100, layout="strided"),
    _case("40 x 100 transposed", "non-contiguous, columns first", 40, 100, layout="transposed"),
    _case("33 x 80 bare", "no weight and no bias", 33, 80, weight=False, bias=False),
    _case("33 x 80 weight", "weight alone", 33, 80, bias=False),
    _case("33 x 80 bias", "bias alone", 33, 80, weight=False),
    _case("64 x 136 fp32 weight", "parameters wider than the activations", 64, 136, weight_dtype=torch.float32),
    _case("64 x 136 bf16 weight", "parameters narrower than the activations", 64, 136, weight_dtype=torch.bfloat16),
    _case("12 x 64 of 3", "no variance at all", 12, 64, scale=0.0, shift=3.0),
    _case("16 x 200 + 100", "mean far above the deviation", 16, 200, shift=100.0),
    _case("9 x 6000 + 3000", "mean 3000 deviations from zero, of many columns", 9, 6000, shift=3000.0),
    _case("5 x 9001 + 5000", "the same in rows too long for a buffer", 5, 9001, shift=5000.0),
    _case(
        "4 x 4099 of 1e9",
        "equal numbers but for a few: they deviate by less than their mean is rounded by",
        4,
        4099,
        scale=1e-6,
        shift=100.0,
        values="one huge row",
        huge_row=True,
    ),
    _case("5 x 777 of 0.1", "equal numbers whose mean has to be rounded", 5, 777, scale=0.0, shift=0.1),
    _case("16 x 200, one huge", "one row of 1e4", 16, 200, huge_row=True),
    _case("16 x 200 of 1e-6", "variance below eps", 16, 200, scale=1e-6),
)

_ADD = (
    _case("64 x 136 fp32 residual", "a residual stream wider than the activations", 64, 136, residual_dtype=_WIDE),
    _case("5 x 9001 fp32 residual", "the same in rows too long for a buffer", 5, 9001, residual_dtype=_WIDE),
    _case("64 x 136 dropout", "whole vectors of a mask", 64, 136, dropout_p=0.3),
    _case(
        "30 x 77 dropout", "a mask with a tail, an odd number of columns", 30, 77, dropout_p=0.3, residual_dtype=_WIDE
    ),
    _case("5 x 9001 dropout", "long rows", 5, 9001, dropout_p=0.1),
    _case("9 x 40 all dropped", "nothing is left of x", 9, 40, dropout_p=1.0),
)
ADD_LAYER_NORM = tuple(replace(c, add=True) for c in (*LAYER_NORM, *_ADD))
RMS_NORM = (
    *(replace(c, rms=True) for c in LAYER_NORM if c.weight or not c.bias),
    _case("64 x 136 zero-centred", "1 + weight", 64, 136, rms=True, zero_centered=True),
    _case(
        "64 x 136 zero-centred fp32",
        "1 + weight, wider than the activations",
        64,
        136,
        rms=True,
        zero_centered=True,
        weight_dtype=torch.float32,
    ),
)
ADD_RMS_NORM = tuple(replace(c, add=True, rms=True) for c in (*RMS_NORM, *_ADD))
