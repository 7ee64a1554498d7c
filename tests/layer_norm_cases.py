"""What the tests of the CUDA layer norm share: sizes by regime, the call, and the rule of exactness."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import torchweld
from torchweld.reference.philox import dropout_factors

# Columns of a row, each with the code path that it reaches (csrc/cuda/norm/forward.cu, backward.cu). float32 rows
# divisible by 4 and 16-bit rows divisible by 8 are accessed in packets of 16 bytes, the others element by element.
COLUMNS = {
    1: "one lane, one column",
    3: "one lane, elements",
    8: "one lane, one packet",
    9: "two lanes, elements",
    64: "several rows per warp",
    255: "a warp for the row, elements, its last lane not full",
    256: "the longest short row",
    257: "the shortest of whole warps, elements",
    264: "the shortest of whole warps, packets",
    768: "3 warps per row backward, one forward",
    1000: "one warp forward, the last one not full",
    1023: "elements, several warps",
    1280: "backward with one row per block",
    2048: "the longest with weight gradients in registers",
    2049: "slabs: elements, two slabs",
    2056: "the shortest with weight gradients in shared memory",
    4096: "4 warps",
    8193: "long rows forward: elements; cut into slabs where rows are few",
    16384: "the longest with weight gradients in shared memory, the longest on chip forward",
    16392: "the same in packets; slabs backward",
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Inputs(NamedTuple):
    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    doutput: Tensor
    dsum: Tensor | None
    rms: bool = False  # then without a bias
    dropout_p: float = 0.0


SEED = 2**40 + 17


def inputs(
    rows: int,
    cols: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    *,
    add: bool,
    device: str = "cpu",
    offset: int = 0,
    seed: int = 0,
    rms: bool = False,
    dropout_p: float = 0.0,
    residual_dtype: torch.dtype | None = None,
    mean: float = 2.0,
) -> Inputs:
    """Random inputs between NaN that must not be read, `offset` elements into their storage (1: not on 16 bytes)."""
    wide = residual_dtype or dtype
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape: int, dtype: torch.dtype, mean: float = 0.0) -> Tensor:
        values = (torch.randn(shape, generator=generator) + mean).to(dtype).to(device)
        storage = torch.full((offset + values.numel() + 8,), float("nan"), dtype=dtype, device=device)
        inside = storage[offset : offset + values.numel()]
        inside.copy_(values.flatten())
        return inside.view(shape)

    return Inputs(
        tensor(rows, cols, dtype=dtype, mean=mean),
        tensor(rows, cols, dtype=wide) if add else None,
        None if weight_dtype is None else tensor(cols, dtype=weight_dtype, mean=1.0),
        None if weight_dtype is None or rms else tensor(cols, dtype=weight_dtype),
        tensor(rows, cols, dtype=dtype),
        tensor(rows, cols, dtype=wide) if add else None,
        rms,
        dropout_p,
    )


def summed(i: Inputs, x: Tensor, residual: Tensor | None) -> Tensor:
    """What is normalised, by the definition of the mask and torch's arithmetic."""
    if residual is None:
        return x
    if i.dropout_p > 0:
        seed = torch.tensor([SEED], device=x.device)
        x = x * dropout_factors(seed, x.shape[0], x.shape[1], i.dropout_p).to(x.dtype)
    return residual + x


def run(i: Inputs, op: str = "torchweld", dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Outputs and gradients of layer_norm or rms_norm, or of their add_ forms where there is a residual."""
    x, residual, weight, bias = (
        None if t is None else t.detach().to(dtype or t.dtype).requires_grad_()
        for t in (i.x, i.residual, i.weight, i.bias)
    )
    assert x is not None
    shape = x.shape[-1:]
    parameters: list[Tensor | float | None] = [weight, 1e-5] if i.rms else [weight, bias, 1e-5]
    name = "rms_norm" if i.rms else "layer_norm"
    if op == "torch":  # no fused add there; torch takes one dtype for all
        total = summed(i, x, residual)
        parameters = [p.to(total.dtype) if isinstance(p, Tensor) else p for p in parameters]
        output = getattr(torch.nn.functional, name)(total, shape, *parameters).to(x.dtype)
    elif residual is None:
        output, total = getattr(torchweld.ops, name)(x, shape, *parameters), x
    else:
        # Only where it counts: a copy from the host cannot be captured in a graph.
        seed = torch.tensor([SEED], device=x.device) if i.dropout_p > 0 else None
        output, total = getattr(torchweld.ops, "add_" + name)(
            x, residual, shape, *parameters, dropout_p=i.dropout_p, seed=seed
        )
    loss = (output * i.doutput.to(output.dtype)).sum()
    if i.dsum is not None:
        loss = loss + (total * i.dsum.to(total.dtype)).sum()
    loss.backward()
    found = {"output": output, "dx": x.grad}
    if residual is not None:
        found |= {"sum": total, "dresidual": residual.grad}
    if weight is not None:
        found |= {"dweight": weight.grad}
    if bias is not None:
        found |= {"dbias": bias.grad}
    return {name: t.detach() for name, t in found.items() if t is not None}


def exact(i: Inputs) -> dict[str, Tensor]:
    """In float64, of the sum as it is rounded to the residual's dtype before it is normalised."""
    if i.residual is None:
        return run(i, "torch", torch.float64)
    wide = i.residual.dtype if i.residual.dtype != i.x.dtype else torch.float64
    rounded = summed(i, i.x.to(wide), i.residual.to(wide)).to(i.residual.dtype)
    total = i._replace(x=rounded, residual=None, dropout_p=0.0)
    found = run(total, "torch", torch.float64)
    through = found["dx"]
    if i.dropout_p > 0:
        seed = torch.tensor([SEED], device=i.x.device)
        through = through * dropout_factors(seed, i.x.shape[0], i.x.shape[1], i.dropout_p)
    return found | {"sum": rounded.double(), "dresidual": found["dx"], "dx": through}


def check(i: Inputs, found: dict[str, Tensor] | None = None) -> None:
    """max|ours - fp64| <= 2 x max|torch in the same dtype - fp64| + one ulp of the largest value, for all results."""
    ours, torchs, truth = found or run(i), run(i, "torch"), exact(i)
    assert ours.keys() == truth.keys()
    for name, expected in truth.items():
        got = ours[name]
        assert got.shape == expected.shape and got.dtype == torchs[name].dtype, name
        if expected.numel() == 0:
            continue
        ulp = torch.finfo(got.dtype).eps * float(expected.abs().max())
        allowed = 2 * float((torchs[name].double() - expected).abs().max()) + ulp
        error = float((got.double() - expected).abs().max())
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"  # NaN fails too
