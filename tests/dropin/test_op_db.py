"""torch's own samples of its operators (`op_db`), run on ours: values, gradients, errors, and every way to derive.

What is true is torch's operator in float64. The samples are tiny: test_large_shapes.py has others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._comparison import default_tolerances
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_utils import freeze_rng_state
from torch.utils._pytree import tree_leaves

from torchweld import ops

ENTRIES = {entry.name.removeprefix("nn.functional."): entry for entry in op_db if not entry.variant_test_name}
OURS: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": ops.cross_entropy,
    "gelu": ops.gelu,
    "layer_norm": ops.layer_norm,
    "rms_norm": ops.rms_norm,
    "scaled_dot_product_attention": ops.scaled_dot_product_attention,
}
# torch lists those of layer_norm under its other name, and none of scaled_dot_product_attention and cross_entropy.
ERRORS = {"gelu": "gelu", "layer_norm": "native_layer_norm", "rms_norm": "rms_norm"}

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
CALLS = [
    pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for name in OURS
    for dtype in sorted(ENTRIES[name].supported_dtypes("cpu"), key=str)
    if dtype.is_floating_point
]
FEW_CALLS = [call for call in CALLS if call.values[1] in (torch.float32, torch.float64)]  # kernels, reference
# All that is left out, and why; and complex numbers, for which torch composes rms_norm and we have no definition.
SKIPPED = {
    ("forward-mode", "scaled_dot_product_attention"): "torch's own attention has no forward-mode derivative",
}


def except_skipped(test: str) -> list[Any]:
    reasons = {name: SKIPPED.get((test, name)) for name in OURS}
    return [pytest.param(n, marks=[pytest.mark.skip(reason=r)] if r else []) for n, r in reasons.items()]


def samples(name: str, device: str, dtype: torch.dtype, requires_grad: bool = True) -> Iterator[Any]:
    entry = ENTRIES[name]
    yield from entry.sample_inputs(device, dtype, requires_grad=requires_grad)
    if entry.reference_inputs_func is not None:
        yield from entry.reference_inputs(device, dtype, requires_grad=requires_grad)


def call(function: Callable[..., Tensor], sample: Any) -> Tensor:
    torch.manual_seed(3)  # of dropout
    return function(sample.input, *sample.args, **sample.kwargs)


def leaves(sample: Any) -> list[Tensor]:
    found = tree_leaves((sample.input, sample.args, sample.kwargs))
    return [t for t in found if isinstance(t, Tensor) and t.requires_grad]


def results(function: Callable[..., Tensor], sample: Any) -> list[Tensor]:
    """The output, and the gradients of everything that needs one for a fixed gradient of the output."""
    output = call(function, sample)
    doutput = torch.linspace(-1.0, 1.0, output.numel(), dtype=torch.float64, device=output.device).view_as(output)
    return [output, *torch.autograd.grad(output, leaves(sample), doutput.to(output.dtype))]


def exact(name: str, sample: Any) -> list[Tensor]:
    """torch in float64. Where it draws a dropout mask of its own, ours in float64: the definition, with our mask."""

    def widened(t: Any) -> Any:
        wide = isinstance(t, Tensor) and t.is_floating_point()
        return t.detach().double().requires_grad_(t.requires_grad) if wide else t

    dropout = sample.kwargs.get("dropout_p", 0.0) > 0
    return results(OURS[name] if dropout else ENTRIES[name].op, sample.transform(widened))


def torch_fused(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """torch's attention by the kernel that it has for four dimensions; it composes the op for three."""
    batch = torch.broadcast_shapes(*(t.shape[:-2] for t in (query, key, value)))
    q, k, v = (t.expand(*batch, *t.shape[-2:]).reshape(-1, batch[-1], *t.shape[-2:]) for t in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
    return out.reshape(*batch, *out.shape[-2:])


def error(got: Tensor, truth: Tensor, least: float = 1.0) -> float:
    """The largest error as a share of the largest value: small differences of large terms are as inexact as those."""
    finite = truth.isfinite()
    assert torch.equal(got[~finite].to(truth.dtype).nan_to_num(9e9), truth[~finite].nan_to_num(9e9))
    if not finite.any():
        return 0.0
    return float((got.to(truth.dtype) - truth)[finite].abs().max() / truth[finite].abs().max().clamp(min=least))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "dtype"), CALLS)
def test_values_and_gradients(name: str, dtype: torch.dtype, device: str) -> None:
    """No further from the truth than torch's tolerance for the dtype plus twice what torch is, over all samples."""
    torchs_own = torch_fused if name == "scaled_dot_product_attention" else ENTRIES[name].op
    mine, torchs = [0.0], [0.0]
    for sample in samples(name, device, dtype):
        ours, theirs = results(OURS[name], sample), results(torchs_own, sample)
        for got, like, truth in zip(ours, theirs, exact(name, sample), strict=True):
            assert (got.dtype, got.shape, got.device) == (like.dtype, like.shape, like.device)
            if sample.kwargs.get("dropout_p", 0.0) > 0:  # torch has another mask; what cancels are products of two 9s
                mine.append(error(got.detach(), truth.detach(), least=9.0**2))
            else:
                mine.append(error(got.detach(), truth.detach()))
                torchs.append(error(like.detach(), truth.detach()))
    assert max(mine) <= default_tolerances(dtype)[0] + 2 * max(torchs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "dtype"), FEW_CALLS)
def test_non_contiguous(name: str, dtype: torch.dtype, device: str) -> None:
    for sample in samples(name, device, dtype):
        for got, expected in zip(results(OURS[name], sample.noncontiguous()), results(OURS[name], sample), strict=True):
            torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "dtype"), FEW_CALLS)
def test_a_fake_call_gives_what_the_real_one_does(name: str, dtype: torch.dtype, device: str) -> None:
    for sample in samples(name, device, dtype):
        real = call(OURS[name], sample)
        with FakeTensorMode() as mode:
            fake = call(OURS[name], sample.transform(lambda t: mode.from_tensor(t) if isinstance(t, Tensor) else t))
        assert (fake.dtype, fake.shape) == (real.dtype, real.shape)
        assert fake.stride() == real.stride() or real.numel() == 0


def derivable(name: str, device: str) -> Iterator[tuple[Callable[..., Tensor], list[Tensor]]]:
    """For gradcheck, of each sample in float64: a function of what needs a gradient, and that."""
    for sample in samples(name, device, torch.float64):
        wanted = leaves(sample)

        def function(*given: Tensor, sample: Any = sample, wanted: list[Tensor] = wanted) -> Tensor:
            swap = dict(zip(map(id, wanted), given, strict=True))
            args = [swap.get(id(t), t) for t in (sample.input, *sample.args)]
            options = {key: swap.get(id(t), t) for key, t in sample.kwargs.items()}
            with freeze_rng_state():
                return ENTRIES[name].gradcheck_wrapper(OURS[name], *args, **options)

        yield function, wanted


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OURS)
def test_gradients_of_gradients(name: str, device: str) -> None:
    for function, wanted in derivable(name, device):
        assert torch.autograd.gradcheck(function, wanted, fast_mode=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(
            function, wanted, fast_mode=True, check_batched_grad=True, gen_non_contig_grad_outputs=True
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", except_skipped("forward-mode"))
def test_forward_mode(name: str, device: str) -> None:
    options = {"check_forward_ad": True, "check_batched_forward_grad": True, "check_batched_grad": False}
    for function, wanted in derivable(name, device):
        assert torch.autograd.gradcheck(function, wanted, fast_mode=True, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str, device: str) -> None:
    """The same kind of error; ours names the op, what was expected and what was given."""
    for error in ENTRIES[ERRORS[name]].error_inputs(device):
        with pytest.raises(error.error_type):
            call(ENTRIES[name].op, error.sample_input)
        with pytest.raises(error.error_type, match=rf"^\[{name}\] \w+: expected .* but got "):
            call(OURS[name], error.sample_input)
