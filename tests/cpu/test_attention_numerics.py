"""attention where float32 is easily lost: finite masks, scores far from zero, and gradients that are exactly zero."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchweld import ops, reference
from torchweld.testing import Oracle
from torchweld.testing.attention import AttentionCase
from torchweld.testing.attention_packed import PackedAttentionCase
from torchweld.testing.case import Tensors
from torchweld.testing.fuzz.attention import SdpaCase

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST = {dtype: torch.finfo(dtype).min for dtype in DTYPES}


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """The calls are small."""
    torch.set_num_threads(1)


@dataclass(frozen=True, kw_only=True)
class Extreme(AttentionCase):
    """`hidden`: what the bias is where it is not zero, -inf for the least number of the dtype, in the pattern `where`.

    `offset`: what is added to every score of a query, by one more direction of queries and keys.
    """

    hidden: float = 0.0
    where: str = ""
    offset: float = 0.0
    sink: float | None = None

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Tensors:
        x = super().inputs(dtype, device, seed)
        if self.offset:
            root = math.sqrt(abs(self.offset) * math.sqrt(self.dim))
            x["query"][..., 0] = root
            x["key"][..., 0] = math.copysign(root, self.offset)
        if self.where:
            keys, queries = torch.arange(self.keys), torch.arange(self.queries).unsqueeze(1)
            hidden = {
                "padding": (keys < self.keys // 2).expand(self.queries, -1),
                "documents": keys * 4 // self.keys != queries * 4 // self.queries,
                "a row": (queries == 2).expand(-1, self.keys),
                "all": torch.ones(self.queries, self.keys, dtype=torch.bool),
            }[self.where]
            x["bias"] = torch.zeros(self.queries, self.keys, dtype=dtype).masked_fill(
                hidden, max(self.hidden, LEAST[dtype])
            )
        if self.sink is not None:
            x["sinks"] += self.sink
        return x


def extreme(name: str, queries: int = 40, keys: int = 600, dim: int = 32, **options: object) -> Extreme:
    return Extreme(name=name, regime="", queries=queries, keys=keys, dim=dim, **options)  # type: ignore[arg-type]


MASKS = [
    extreme(f"{where} {hidden:g}", bias=(40, 600), where=where, hidden=hidden)
    for where in ("padding", "documents", "a row", "all")
    for hidden in (-100.0, -1e4, -1e10, -1e30, -math.inf)
]
FAR = [
    *(extreme(f"scores of {n:g}", logits=n, dim=64) for n in (8e4, 8e9)),
    *(
        extreme(f"offset {n:g}, D {d}, bias {b}", offset=n, dim=d, bias=b, dtypes=(torch.float32,))
        for n in (8e4, -8e4, 8e9)
        for d, b in ((32, None), (64, None), (64, (1, 2, 40, 600)))
    ),
    *(extreme(f"{q} queries, scores of 1e4", q, keys, 64, logits=1e4) for q, keys in ((1, 127), (2, 2), (4, 33))),
    extreme("far slopes", alibi=True, logits=1e3, lse=True),
    extreme("steep softcap", 190, 300, softcap=5.0, logits=1e3, alibi=True, lse=True, dtypes=(torch.float32,)),
    *(
        extreme(f"sink of {s:g}, offset {n:g}", sinks=True, sink=s, offset=n, lse=True, dtypes=(torch.float32,))
        for s, n in ((1e4, 0.0), (-1e4, 0.0), (30.0, 0.0), (-30.0, 0.0), (1e4, 9970.0))
    ),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MASKS, ids=lambda case: case.name)
def test_a_finite_mask_is_a_number(case: Extreme, dtype: torch.dtype, each_isa: Iterator[str]) -> None:
    """However many keys it hides before the first that is seen: weights, and every gradient."""
    oracle = Oracle(case, dtype)
    for _ in each_isa:
        oracle.check()


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(c, d) for c in FAR for d in c.dtypes if d is not torch.float16 or max(c.logits, abs(c.offset)) <= 1e4],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_scores_far_from_zero(case: Extreme, dtype: torch.dtype, each_isa: Iterator[str]) -> None:
    """What all scores of a row have in common changes nothing; the backward makes the forward's weights again."""
    oracle = Oracle(case, dtype)
    for _ in each_isa:
        oracle.check()


SIXTEEN = [  # each with a seed for which what is too coarse, of output, weights or their sum, misses the rule
    (SdpaCase(name="one key has nearly all", regime="", heads=1, queries=501, keys=512, dim=80, logits=1e4,
              layout="transposed"), 298600),
    (AttentionCase(name="lse of like scores", regime="", heads=1, queries=7, keys=129, lse=True, scale=0.001), 618413),
    (AttentionCase(name="sinks", regime="", queries=90, keys=400, sinks=True), 0),
    (AttentionCase(name="a bias in float32", regime="", queries=90, keys=400, bias=(1, 2, 90, 400),
                   bias_dtype=torch.float32), 0),
    (SdpaCase(name="a bias in float32, few keys", regime="", queries=4, keys=7, bias=(1, 4, 7),
              bias_dtype=torch.float32, values="integers"), 606609),
    (SdpaCase(name="values with a common part", regime="", heads=1, queries=127, keys=127, values="shifted",
              layout="strided", dtypes=(torch.bfloat16,)), 369576),
    (SdpaCase(name="keys with a common part, head size 1", regime="", heads=1, queries=4, keys=4, dim=1, bias=(1, 4, 4),
              values="shifted"), 277722),
    (AttentionCase(name="slopes, keys share a part", regime="", queries=63, keys=255, alibi=True, values="shifted",
                   scale=0.001), 832840),
    (AttentionCase(name="large logits, head size 1", regime="", queries=33, keys=4099, dim=1, bias=(1, 1, 33, 4099),
                   logits=20.0), 292075),
    (AttentionCase(name="slopes", regime="", queries=90, keys=400, alibi=True), 0),
    (PackedAttentionCase(name="packed", regime="", queries=509, keys=600, dim=80, logits=1e4,
                         lengths=((8, 0), (501, 512), (0, 88))), 1),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "seed", "dtype"),
    [(case, seed, dtype) for case, seed in SIXTEEN for dtype in DTYPES[1:] if dtype in case.dtypes],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_16_bits_keep_their_digits(case: AttentionCase, seed: int, dtype: torch.dtype, each_isa: Iterator[str]) -> None:
    """Gradients are of an output that was not rounded, and sums are of the weights that made it."""
    oracle = Oracle(case, dtype, seed=seed)
    for _ in each_isa:
        oracle.check()


def test_the_backward_reads_the_output_in_float32() -> None:
    query, key, value = (torch.randn(1, 2, 5, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    saved: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = ops.attention(query, key, value)
    assert isinstance(out, Tensor)
    (wide,) = (t for t in saved if t.shape == out.shape and t.dtype == torch.float32)
    assert torch.equal(wide.to(out.dtype), out) and not torch.equal(wide, out.float())


def visible(kind: str, queries: int, keys: int) -> dict[str, object]:
    """Modifiers that leave each query one key."""
    only = torch.arange(keys) == (torch.arange(queries) * 7 % keys).unsqueeze(1)
    return {
        "one key": {},
        "window": {"window": (0, 0)},
        "boolean": {"bias": only},
        "-inf": {"bias": torch.zeros(queries, keys).masked_fill(~only, -math.inf)},
        "finite": {"bias": torch.zeros(queries, keys).masked_fill(~only, -1e9)},
    }[kind]  # type: ignore[return-value]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize(
    ("kind", "keys"),
    [("one key", 1), ("window", 70), ("boolean", 70), ("boolean", 500), ("-inf", 500), ("finite", 500)],
)
def test_one_visible_key_has_no_gradient(
    kind: str, keys: int, softcap: float, dropout_p: float, dtype: torch.dtype
) -> None:
    """P is 1 whatever the scores are: queries and keys get exactly 0, and the bias too."""
    q, k, v = (torch.randn(1, 2, n, 40).to(dtype).requires_grad_() for n in (70, keys, keys))
    modifiers = visible(kind, 70, keys)
    leaves = [q, k, v]
    bias = modifiers.get("bias")
    if isinstance(bias, Tensor) and bias.dtype.is_floating_point:
        leaves.append(bias.requires_grad_())
    seed = torch.tensor([5])
    out = ops.attention(q, k, v, softcap=softcap, dropout_p=dropout_p, seed=seed, **modifiers)  # type: ignore[arg-type]
    assert isinstance(out, Tensor)
    dq, dk, dv, *dbias = torch.autograd.grad(out, leaves, torch.randn_like(out))
    assert dv.any()
    for gradient in (dq, dk, *dbias):
        assert not gradient.any(), gradient.abs().max()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [100, 700])
def test_few_queries(keys: int, dtype: torch.dtype) -> None:
    """The kernels for decoding: masks that hide the first splits, and rows that they hide as a whole."""
    q, k, v = (torch.randn(2, 4, n, 64).to(dtype) for n in (1, keys, keys))
    for hidden in (-100.0, -1e9, LEAST[dtype]):
        mask = torch.zeros(2, 1, 1, keys, dtype=dtype)
        mask[0, ..., : keys // 2], mask[1] = max(hidden, LEAST[dtype]), max(hidden, LEAST[dtype])
        exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask.double())
        theirs = F.scaled_dot_product_attention(q, k, v, mask)
        ours = ops.scaled_dot_product_attention(q, k, v, mask)
        allowed = 2 * (theirs.double() - exact).abs().max() + torch.finfo(dtype).eps
        assert (ours.double() - exact).abs().max() <= allowed, hidden


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("offset", [2.0**16, 2.0**33])
@pytest.mark.parametrize("sink", [None, 30.0, 2.0**16])
def test_a_cache_in_blocks(offset: float, sink: float | None) -> None:
    """Scores that are all alike but large, in splits that are merged."""
    q, k, v = torch.ones(1, 2, 1, 64), torch.full((3, 256, 1, 64), offset / 8), torch.randn(3, 256, 1, 64)
    table, lengths = torch.arange(3, dtype=torch.int32).unsqueeze(0), torch.tensor([700], dtype=torch.int32)
    sinks = None if sink is None else torch.tensor([sink, sink])
    got = ops.paged_attention(q, k, v, table, lengths, sinks=sinks, return_lse=True)
    wide = None if sinks is None else sinks.double()
    want = reference.paged_attention(q.double(), k.double(), v.double(), table, lengths, sinks=wide, return_lse=True)
    for ours, exact in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2e-7, atol=1e-6)


@pytest.mark.usefixtures("isa")
def test_rows_of_the_least_number_under_torchs_own_function() -> None:
    """Its backward is given lse alone, of which float32 holds nothing but the maximum there."""
    q, k, v = (torch.randn(1, 2, 80, 16, requires_grad=True) for _ in range(3))
    mask = torch.zeros(80, 80)
    mask[:, :50] = -1e9
    mask[2:9] = LEAST[torch.float32]
    torch.nn.attention.activate_flash_attention_impl("torchweld")
    try:
        ours = F.scaled_dot_product_attention(q, k, v, mask)
        got = [ours, *torch.autograd.grad(ours.square().sum(), (q, k, v))]
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    out = torch.softmax(exact[0] @ exact[1].mT / 4 + mask.double(), -1) @ exact[2]
    want = [out, *torch.autograd.grad(out.square().sum(), exact)]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
