"""The modules against torch's own: same parameters, same results, checkpoints both ways."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch

from torchweld import nn

BATCH, QUERIES, KEYS, WIDTH, HEADS = 3, 7, 11, 32, 4


def twins(**arguments: object) -> tuple[torch.nn.MultiheadAttention, nn.MultiheadAttention]:
    theirs = torch.nn.MultiheadAttention(WIDTH, HEADS, **arguments).double()  # type: ignore[arg-type]
    ours = nn.MultiheadAttention(WIDTH, HEADS, **arguments).double()  # type: ignore[arg-type]
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def compare(theirs: torch.nn.Module, ours: torch.nn.Module, *inputs: torch.Tensor, **arguments: object) -> None:
    """Outputs and every gradient: float64 (where both are exact) to 1e-10, then ours in float32 against that."""
    results = []
    for module, dtype in ((theirs, torch.float64), (ours, torch.float64), (ours, torch.float32)):
        module.to(dtype).zero_grad()
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        masks = {
            k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in arguments.items()
        }
        out, weights = module(*leaves, **masks)
        assert weights is None
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape))
        results.append([out.detach(), *(x.grad for x in leaves), *(p.grad.clone() for p in module.parameters())])
    ours.double()
    for exact, same, single in zip(*results, strict=True):
        torch.testing.assert_close(same, exact, rtol=0, atol=1e-10)
        torch.testing.assert_close(single.double(), exact, rtol=0, atol=1e-5 * max(1.0, float(exact.abs().max())))


def inputs(batch_first: bool) -> list[torch.Tensor]:
    shapes = [(BATCH, n, WIDTH) if batch_first else (n, BATCH, WIDTH) for n in (QUERIES, KEYS, KEYS)]
    return [torch.randn(s, dtype=torch.float64) for s in shapes]


@pytest.mark.parametrize(("batch_first", "bias"), itertools.product((True, False), repeat=2))
def test_cross_attention(batch_first: bool, bias: bool) -> None:
    compare(*twins(batch_first=batch_first, bias=bias), *inputs(batch_first), need_weights=False)


@pytest.mark.parametrize("options", [{"kdim": 12, "vdim": 20}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_options(options: dict[str, object]) -> None:
    q, k, v = inputs(True)
    k, v = k[..., : options.get("kdim")], v[..., : options.get("vdim")]  # type: ignore[misc]
    padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    padding[1, 5:] = True
    compare(*twins(batch_first=True, **options), q, k, v, key_padding_mask=padding, need_weights=False)


@pytest.mark.parametrize("padded", [None, "bool", "float"])
@pytest.mark.parametrize("mask", [None, "bool", "float", "per head"])
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
def test_masks(mask: str | None, padded: str | None) -> None:
    attend = torch.rand(QUERIES, KEYS) < 0.7
    attend[:, 0] = True
    masks = {
        None: None,
        "bool": ~attend,
        "float": torch.randn(QUERIES, KEYS, dtype=torch.float64),
        "per head": torch.randn(BATCH * HEADS, QUERIES, KEYS, dtype=torch.float64),
    }
    padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    padding[0, 6:] = padding[2, 9:] = True
    additive = torch.zeros(BATCH, KEYS, dtype=torch.float64).masked_fill_(padding, float("-inf"))
    paddings = {None: None, "bool": padding, "float": additive}
    compare(
        *twins(batch_first=True),
        *inputs(True),
        attn_mask=masks[mask],
        key_padding_mask=paddings[padded],
        need_weights=False,
    )


def test_causal_self_attention() -> None:
    theirs, ours = twins(batch_first=True)
    x = torch.randn(BATCH, QUERIES, WIDTH, dtype=torch.float64)
    causal = torch.nn.Transformer.generate_square_subsequent_mask(QUERIES, dtype=torch.float64)
    expected = theirs(x, x, x, attn_mask=causal, need_weights=False)[0]
    for is_causal in (True, False):
        got = ours(x, x, x, attn_mask=causal, is_causal=is_causal, need_weights=False)[0]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_unbatched() -> None:
    x = [torch.randn(n, WIDTH, dtype=torch.float64) for n in (QUERIES, KEYS, KEYS)]
    padding = torch.arange(KEYS) > 8
    compare(*twins(), *x, key_padding_mask=padding, need_weights=False)


def test_weights_on_request() -> None:
    theirs, ours = twins(batch_first=True)
    x = inputs(True)
    for average in (True, False):
        for got, expected in zip(
            ours(*x, average_attn_weights=average), theirs(*x, average_attn_weights=average), strict=True
        ):
            assert torch.equal(got, expected)


def test_dropout_only_in_training() -> None:
    ours = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.5, batch_first=True)
    x = torch.randn(BATCH, QUERIES, WIDTH)
    first, second = (ours(x, x, x, need_weights=False)[0] for _ in range(2))
    assert not torch.equal(first, second)
    ours.eval()
    first, second = (ours(x, x, x, need_weights=False)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_wrong_shape_is_refused_as_torch_does() -> None:
    theirs, ours = twins(batch_first=True)
    x = torch.randn(BATCH, QUERIES, WIDTH, dtype=torch.float64)
    for arguments in ({"attn_mask": torch.zeros(3, 3)}, {"is_causal": True}):
        with pytest.raises(Exception) as expected:
            theirs(x, x, x, need_weights=False, **arguments)
        with pytest.raises(type(expected.value)):
            ours(x, x, x, need_weights=False, **arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [(name, a) for name in ("LayerNorm", "RMSNorm") for a in ({}, {"elementwise_affine": False}, {"eps": 0.1})]
    + [("LayerNorm", {"bias": False})],
)
def test_a_norm_is_torchs(name: str, arguments: dict[str, object]) -> None:
    theirs, ours = (getattr(module, name)((5, 16), **arguments) for module in (torch.nn, nn))
    for p in theirs.parameters():
        torch.nn.init.normal_(p)
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, getattr(torch.nn, name))
    assert repr(ours) == repr(theirs)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.randn(3, 5, 16, dtype=dtype)
        torch.testing.assert_close(ours.to(dtype)(x), theirs.to(dtype)(x))


@pytest.mark.parametrize("module", [nn.LayerNorm(16), nn.RMSNorm(16), nn.MultiheadAttention(WIDTH, HEADS)])
def test_copies_are_whole(module: torch.nn.Module) -> None:
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module)
        for (name, a), (other, b) in zip(module.state_dict().items(), twin.state_dict().items(), strict=True):
            assert name == other
            assert torch.equal(a, b)


def test_features_made_in_inference_mode() -> None:
    """Those of a frozen model, for a head that trains: torch's norm and projections save copies of their own."""
    with torch.inference_mode():
        features = torch.randn(BATCH, KEYS, WIDTH)
    query = torch.randn(BATCH, QUERIES, WIDTH)
    heads = {
        "RMSNorm": ((WIDTH,), (features,)),
        "TransformerEncoderLayer": ((WIDTH, HEADS, 24, 0.0, "relu", 1e-5, True), (features,)),
        "TransformerDecoderLayer": ((WIDTH, HEADS, 24, 0.0, "relu", 1e-5, True), (query, features)),
    }
    for name, (arguments, inputs) in heads.items():
        stock, ours = getattr(torch.nn, name)(*arguments), getattr(nn, name)(*arguments)
        ours.load_state_dict(stock.state_dict())
        for module in (stock, ours):
            module(*inputs).square().sum().backward()
        for p, q in zip(stock.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(ours(*inputs), stock(*inputs), rtol=1e-4, atol=1e-5)
