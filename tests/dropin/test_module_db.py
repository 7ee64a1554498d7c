"""torch's own test data base of modules, run against the drop-ins: what torch's suite asks of its modules, they give.

The inputs of each entry go through the properties that torch's test_modules.py checks, and beside torch's module with
the same parameters; those of MultiheadAttention also without weights, which is what the fused attention serves.
Beyond its tiny shapes hypothesis draws others.
Not run, as torch does not run it for these modules either: memory formats (they know no channels_last), in-place
arguments and error inputs (they have none). torch has no entry for TransformerDecoder; test_transformer.py has.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_modules import module_db
from torch.testing._internal.common_utils import noncontiguous_like
from torch.utils._pytree import tree_map

from torchweld import nn
from torchweld.nn.twins import TWINS
from torchweld.testing.modules import Trial, check_modules, evaluate_module

ENTRIES = {info.module_cls.__name__: info for info in module_db if info.module_cls in TWINS}
MODES = [
    (name, training) for name, info in ENTRIES.items() for training in (True, False)[: 1 + info.train_and_eval_differ]
]
NO_FACTORY = {"TransformerEncoder": "torch expects this to fail: a container that takes neither device nor dtype"}

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
modes = pytest.mark.parametrize(("name", "training"), MODES, ids=lambda v: {True: "train", False: "eval"}.get(v, v))
pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
]


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """The tensors have a few dozen elements."""
    torch.set_num_threads(1)


class Sample(NamedTuple):
    name: str
    construct: Any
    inputs: tuple[Tensor, ...]
    masks: dict[str, Any]

    def modules(self, cls: type[torch.nn.Module], training: bool) -> tuple[torch.nn.Module, torch.nn.Module]:
        """Ours and torch's, of the same random parameters."""
        args, kwargs = self.construct.args, self.construct.kwargs
        like = self.inputs[0]
        theirs = cls.__bases__[0](*args, **kwargs).to(like.device, like.dtype).train(training)
        ours = cls(*args, **kwargs).to(like.device, like.dtype).train(training)
        for p in theirs.parameters():
            torch.nn.init.normal_(p, std=0.5)
        ours.load_state_dict(theirs.state_dict())
        return ours, theirs

    def call(self, module: torch.nn.Module, *inputs: Tensor) -> Any:
        return module(*inputs, **self.masks)

    def output(self, module: torch.nn.Module, *inputs: Tensor) -> Tensor:
        """The first of the results: the others are made of the same."""
        result = self.call(module, *inputs)
        return result[0] if isinstance(result, tuple) else result


def samples(name: str, training: bool, dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    info = ENTRIES[name]
    found = info.module_inputs_func(info, device=device, dtype=dtype, requires_grad=True, training=training)
    for i, each in enumerate(found):
        call = each.forward_input
        inputs = (*call.args, *(call.kwargs.pop(k) for k in ("input",) if k in call.kwargs))
        sample = Sample(f"{name}[{i}] {each.desc}", each.constructor_input, inputs, call.kwargs)
        yield sample
        if name == "MultiheadAttention":
            masks = call.kwargs | {"need_weights": False}
            yield sample._replace(name=f"{sample.name} without weights", masks=masks)


def some(found: list[Sample], count: int) -> list[Sample]:
    """`count` of them, or a few more: by an odd stride, which meets all options."""
    return found[:: len(found) // count | 1]


def close(got: Any, expected: Any, what: str, **tolerance: float) -> None:
    torch.testing.assert_close(got, expected, msg=lambda text: f"{what}: {text}", **tolerance)


@devices
@modes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_forward_and_grad_are_torchs(name: str, training: bool, dtype: torch.dtype, device: str) -> None:
    """In float64 alike; below that by the one rule. (No gradients in 16 bits: that of ReLU jumps at 0.)"""
    trials = []
    found = list(samples(name, training, dtype, device))
    for sample in some(found, 8) if dtype is torch.bfloat16 else found:
        ours, theirs = sample.modules(TWINS[ENTRIES[name].module_cls], training)
        if dtype is torch.float64:
            got, expected = (evaluate_module(m, sample.output, sample.inputs) for m in (ours, theirs))
            close(got, expected, sample.name, rtol=1e-9, atol=1e-9)
            with torch.no_grad():
                close(sample.call(ours, *sample.inputs), sample.call(theirs, *sample.inputs), sample.name)
        elif all(x.numel() for x in sample.inputs):
            trials.append(Trial(ours, theirs, sample.output, sample.inputs))
    if trials:
        check_modules(trials, f"{dtype}", gradients=dtype is torch.float32)


@modes
def test_gradients_of_first_and_second_order(name: str, training: bool) -> None:
    """Of some samples where there are many; the test above has them all. Of few where the module is one of layers."""
    found = list(samples(name, training, torch.float64))
    for sample in some(found, 2 if name in ("Transformer", "TransformerEncoder") else 6):
        ours, _ = sample.modules(TWINS[ENTRIES[name].module_cls], training)
        parameters = dict(ours.named_parameters())

        def call(*tensors: Tensor, ours: Any = ours, sample: Sample = sample, names: Any = tuple(parameters)) -> Any:
            inputs, values = tensors[: len(sample.inputs)], tensors[len(sample.inputs) :]
            state = dict(zip(names, values, strict=True))
            out = torch.func.functional_call(ours, state, inputs, sample.masks, strict=True)
            return tuple(t for t in out if t is not None) if isinstance(out, tuple) else out

        tensors = (*sample.inputs, *parameters.values())
        assert gradcheck(call, tensors, fast_mode=True), sample.name
        assert gradgradcheck(call, tensors, fast_mode=True), sample.name


@devices
@modes
def test_non_contiguous_inputs(name: str, training: bool, device: str) -> None:
    for sample in some(list(samples(name, training, torch.float32, device)), 12):
        ours, _ = sample.modules(TWINS[ENTRIES[name].module_cls], training)
        masks = {k: noncontiguous_like(m) if isinstance(m, Tensor) else m for k, m in sample.masks.items()}
        strided = [noncontiguous_like(x) for x in sample.inputs]
        got = evaluate_module(ours, sample._replace(masks=masks).output, strided)
        close(got, evaluate_module(ours, sample.output, sample.inputs), sample.name, rtol=1e-5, atol=1e-5)


@modes
def test_pickle_save_load_and_repr(name: str, training: bool) -> None:
    for sample in some(list(samples(name, training, torch.float32)), 4):
        ours, theirs = sample.modules(TWINS[ENTRIES[name].module_cls], training)
        assert repr(ours) == repr(theirs) and str(ours) == str(theirs)
        expected = sample.call(ours, *sample.inputs)
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        for twin in (pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)):
            assert [type(m) for m in twin.modules()] == [type(m) for m in ours.modules()]
            close(sample.call(twin, *sample.inputs), expected, sample.name, rtol=0, atol=0)
        file = io.BytesIO()
        torch.save(ours.state_dict(), file)
        file.seek(0)
        theirs.load_state_dict(torch.load(file, weights_only=True), strict=True)
        close(sample.call(theirs, *sample.inputs), expected, sample.name)


@devices
@pytest.mark.parametrize("name", ENTRIES)
def test_factory_kwargs(name: str, device: str) -> None:
    if name in NO_FACTORY:
        pytest.skip(NO_FACTORY[name])
    for sample in samples(name, True, torch.float32):
        args, kwargs = sample.construct.args, sample.construct.kwargs
        for where, dtype in (("meta", torch.float64), (device, torch.float64), (device, torch.bfloat16)):
            module = TWINS[ENTRIES[name].module_cls](*args, **kwargs, device=where, dtype=dtype)
            for p in (*module.parameters(), *module.buffers()):
                assert (p.device.type, p.dtype) == (where, dtype), sample.name


@pytest.mark.cuda
@modes
def test_cpu_and_gpu_agree(name: str, training: bool) -> None:
    for sample in samples(name, training, torch.float32):
        ours, _ = sample.modules(TWINS[ENTRIES[name].module_cls], training)
        expected = evaluate_module(ours, sample.output, sample.inputs)
        moved = tree_map(lambda x: x.cuda() if isinstance(x, Tensor) else x, (sample.inputs, sample.masks))
        got = evaluate_module(ours.cuda(), partial(sample._replace(masks=moved[1]).output), moved[0])
        close(tree_map(Tensor.cpu, got), expected, sample.name, rtol=1e-4, atol=1e-4)


# ---- Beyond the data base: sizes that reach the vectors, tiles and tails of the kernels.

few, sizes = st.integers(1, 4), st.integers(1, 70)


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
@given(rows=st.integers(1, 200), shape=st.lists(st.integers(1, 40), min_size=1, max_size=2), affine=st.booleans())
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_norms_of_any_size(name: str, rows: int, shape: list[int], affine: bool) -> None:
    cls = TWINS[ENTRIES[name].module_cls]
    ours, theirs = (c(shape, elementwise_affine=affine) for c in (cls, cls.__bases__[0]))
    trials = [Trial(ours, theirs, cls.__call__, [drawn((rows, *shape), seed)]) for seed in range(4)]
    check_modules(trials, f"{rows} x {shape}")


@given(
    batch=st.integers(1, 3), queries=sizes, keys=sizes, heads=st.integers(1, 4), size=st.integers(1, 40), data=st.data()
)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_attention_of_any_size(batch: int, queries: int, keys: int, heads: int, size: int, data: Any) -> None:
    """Every option on, and masks of both kinds that leave each query its first key."""
    options = {o: data.draw(st.booleans(), o) for o in ("bias", "add_bias_kv", "add_zero_attn", "batch_first")}
    options |= {o: data.draw(st.integers(1, 50), o) for o in ("kdim", "vdim")} if data.draw(st.booleans()) else {}
    theirs, ours = (c(size * heads, heads, **options) for c in (torch.nn.MultiheadAttention, nn.MultiheadAttention))
    ours.load_state_dict(theirs.state_dict())
    hidden = drawn((queries, keys), 1) > 0.5
    padding = torch.arange(keys).expand(batch, keys) > data.draw(st.integers(0, keys), "padding")
    hidden[:, 0] = padding[:, 0] = False
    masks = {"attn_mask": hidden} if data.draw(st.booleans(), "masked") else {}
    masks |= {"key_padding_mask": padding} if data.draw(st.booleans(), "padded") else {}
    widths = zip((queries, keys, keys), (size * heads, theirs.kdim, theirs.vdim), strict=True)
    shapes = [(batch, n, w) if options["batch_first"] else (n, batch, w) for n, w in widths]

    def call(module: torch.nn.Module, *x: Tensor) -> Tensor:
        return module(*x, need_weights=False, **masks)[0]

    trials = [Trial(ours, theirs, call, [drawn(s, 5 * seed + i) for i, s in enumerate(shapes)]) for seed in range(3)]
    check_modules(trials, f"{shapes}, {heads} heads, {options}, {list(masks)}")


@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
@given(
    batch=st.integers(1, 3),
    n=sizes,
    m=sizes,
    heads=st.integers(1, 3),
    size=st.integers(2, 24),
    norm_first=st.booleans(),
)
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_layers_of_any_size(name: str, batch: int, n: int, m: int, heads: int, size: int, norm_first: bool) -> None:
    cls = TWINS[ENTRIES[name].module_cls]
    options = {"norm_first": norm_first, "activation": "gelu", "dropout": 0.0, "batch_first": True}
    ours, theirs = (c(size * heads, heads, 2 * size + 1, **options) for c in (cls, cls.__bases__[0]))
    ours.load_state_dict(theirs.state_dict())
    shapes = [(batch, length, size * heads) for length in (n, m)][: 1 + ("Decoder" in name)]
    draws = [[drawn(s, 5 * seed + i) for i, s in enumerate(shapes)] for seed in range(2)]
    check_modules([Trial(ours, theirs, cls.__call__, x) for x in draws], f"{shapes}, {heads} heads, {options}")
