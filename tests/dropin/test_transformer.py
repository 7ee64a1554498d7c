"""The Transformer layers against torch's own: same parameters, same results, hooks that see what they saw before."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from torchweld import nn
from torchweld.nn.twins import TWINS
from torchweld.testing.modules import Trial, check_modules
from transformer_cases import BATCH, HEADS, LAYERS, WIDTH, M, N, inputs, layers, masks, twins

OPTIONS = [
    {},
    {"norm_first": True, "activation": "gelu"},
    {"bias": False, "activation": torch.nn.functional.silu},
    {"norm_first": True, "activation": torch.nn.GELU("tanh")},
]


def compare(
    theirs: torch.nn.Module,
    ours: torch.nn.Module,
    draw: Callable[[], list[torch.Tensor]],
    given: dict[str, torch.Tensor],
    case: str,
) -> None:
    """By the one rule, in float32 and in bfloat16; there not with ReLU: its gradient jumps where rounding crosses 0."""

    def call(module: torch.nn.Module, *x: torch.Tensor) -> torch.Tensor:
        return module(*x, **{k: m.to(x[0].dtype) if m.is_floating_point() else m for k, m in given.items()})

    relu = any(getattr(m, "activation", None) is torch.nn.functional.relu for m in theirs.modules())
    for dtype in (torch.float32,) if relu else (torch.float32, torch.bfloat16):
        trials = [Trial(ours.to(dtype), theirs.to(dtype), call, [x.to(dtype) for x in draw()]) for _ in range(2)]
        check_modules(trials, f"{case} {dtype}")


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("options", OPTIONS, ids=["defaults", "norm first, gelu", "no bias, silu", "norm first, GELU"])
@pytest.mark.parametrize("kind", [None, "bool", "float"])
def test_layers_are_torchs(cls: type[torch.nn.Module], options: dict[str, Any], kind: str | None) -> None:
    batch_first = kind != "bool"
    theirs, ours = layers(cls, batch_first=batch_first, **options)
    compare(theirs, ours, partial(inputs, cls, batch_first), masks(cls, kind) if kind else {}, str(options))


@pytest.mark.parametrize("cls", LAYERS)
def test_unbatched(cls: type[torch.nn.Module]) -> None:
    theirs, ours = layers(cls, activation="gelu")
    compare(theirs, ours, lambda: [t[0] for t in inputs(cls, True)], {}, "unbatched")


@pytest.mark.parametrize("cls", [nn.TransformerEncoder, nn.TransformerDecoder])
@pytest.mark.parametrize("training", [True, False])
def test_stacks_are_torchs(cls: type[torch.nn.Module], training: bool) -> None:
    layer = nn.TransformerEncoderLayer if cls is nn.TransformerEncoder else nn.TransformerDecoderLayer
    stock, _ = layers(layer, activation="gelu", batch_first=True)
    options = {"enable_nested_tensor": False} if cls is nn.TransformerEncoder else {}
    theirs, ours = twins(cls, stock, 2, torch.nn.LayerNorm(WIDTH), **options)
    assert type(stock) is layer.__bases__[0], "the layer that is given stays what it is"
    assert [type(each) for each in ours.layers] == [layer, layer]
    given = {k.replace("src_mask", "mask"): m for k, m in masks(layer, "bool").items()}
    compare(theirs.train(training), ours.train(training), partial(inputs, layer, True), given, cls.__name__)


def test_transformer_is_torchs() -> None:
    theirs, ours = twins(nn.Transformer, WIDTH, HEADS, 2, 2, 24, 0.0, activation="gelu", batch_first=True)
    assert not [m for m in ours.modules() if type(m) in TWINS]
    given = {"tgt_mask": torch.nn.Transformer.generate_square_subsequent_mask(N)}
    compare(theirs, ours, lambda: [torch.randn(BATCH, n, WIDTH) for n in (M, N)], given, "Transformer")


def test_a_given_encoder_stays_what_it_is() -> None:
    encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(WIDTH, HEADS), 1, enable_nested_tensor=False)
    ours = nn.Transformer(WIDTH, HEADS, 1, 1, custom_encoder=encoder)
    assert ours.encoder is encoder
    assert {type(m).__module__.split(".")[0] for m in encoder.modules()} == {"torch"}
    assert type(ours.decoder.layers[0].norm3) is nn.LayerNorm


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padding_in_inference_is_zero_as_torchs_nested_path_leaves_it() -> None:
    stock = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 24, batch_first=True)
    theirs, ours = twins(nn.TransformerEncoder, stock, 2)
    x, padding = torch.randn(BATCH, N, WIDTH), torch.arange(N).expand(BATCH, N) > torch.tensor([[8], [5], [3]])
    with torch.no_grad():
        got, expected = (m.eval()(x, src_key_padding_mask=padding) for m in (ours, theirs))
    torch.testing.assert_close(got, expected)
    assert not got[padding].any()


# ---- Being torch's in everything else.


def test_dropout_only_in_training() -> None:
    for cls in LAYERS:
        ours, x = cls(WIDTH, HEADS, dropout=0.5), inputs(cls, False)
        outputs = [ours(*x) for _ in range(2)]
        torch.manual_seed(3)
        first = ours(*x)
        torch.manual_seed(3)
        assert torch.equal(ours(*x), first)
        assert not torch.equal(*outputs)
        assert torch.equal(*(ours.eval()(*x) for _ in range(2)))


@pytest.mark.parametrize("cls", list(TWINS.values()), ids=lambda c: c.__name__)
def test_interfaces_are_torchs(cls: type[torch.nn.Module]) -> None:
    base = cls.__bases__[0]
    assert cls.__name__ == base.__name__ and getattr(nn, cls.__name__) is cls
    for method in ("__init__", "forward"):
        ours, theirs = (inspect.signature(getattr(c, method)).parameters for c in (cls, base))
        assert [(p.name, p.default, p.kind) for p in ours.values()] == [
            (p.name, p.default, p.kind) for p in theirs.values()
        ]


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_copies_are_whole() -> None:
    module = nn.Transformer(WIDTH, HEADS, 1, 1, 24)
    theirs = torch.nn.Transformer(WIDTH, HEADS, 1, 1, 24)
    theirs.load_state_dict(module.state_dict())
    assert repr(module) == repr(theirs)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert [type(m) for m in twin.modules()] == [type(m) for m in module.modules()]
        for (name, a), (other, b) in zip(module.state_dict().items(), twin.state_dict().items(), strict=True):
            assert name == other
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "bad",
    [
        {"src_mask": torch.zeros(3, 3)},
        {"src_mask": torch.zeros(N, N, dtype=torch.int64)},
        {"src_key_padding_mask": torch.zeros(2, 2)},
        {"is_causal": True},
    ],
)
def test_bad_input_is_refused_as_torch_does(bad: dict[str, Any]) -> None:
    theirs, ours = layers(nn.TransformerEncoderLayer)
    x = torch.randn(N, BATCH, WIDTH)
    with pytest.raises(Exception) as expected:
        theirs(x, **bad)
    with pytest.raises(type(expected.value)):
        ours(x, **bad)


def test_autocast_keeps_the_stream_in_float32() -> None:
    for cls in LAYERS:
        theirs, ours = layers(cls, activation="gelu")
        x = inputs(cls, False)
        with torch.autocast("cpu", torch.bfloat16):
            got, expected = ours(*x), theirs(*x)
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=0, atol=0.1)
