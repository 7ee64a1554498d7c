"""attention: exact by the one rule, the same bits always, and an op like any other to torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from leaves import penalty
from thread_counts import hold_bits
from torchweld import backend, ops
from torchweld.ops._attention import Modifiers, Options
from torchweld.testing import Case, Oracle, cases
from torchweld.testing.attention import AttentionCase

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def ident(value: object) -> str:
    return value.name if isinstance(value, Case) else str(value).removeprefix("torch.")


def wide(name: str, queries: int, keys: int, **flags: object) -> AttentionCase:
    return AttentionCase(name=name, regime="", queries=queries, keys=keys, **flags)  # type: ignore[arg-type]


# What the shared list leaves out: every edge of a tile (blocks of 6 rows, vectors of 4 to 16, panels of 8 to 64, tiles
# of 48, 96, 192, 256 and 512), head sizes about a vector, a pair and a panel, every way in which a bias broadcasts.
EDGES = (2, 6, 7, 16, 17, 48, 49, 96, 97, 193, 257)
WIDE = [
    *(wide(f"{n} x {n}", n, n, heads=1, dim=32, causal=n % 2 == 1) for n in EDGES),
    wide("513 x 513 causal", 513, 513, heads=1, dim=64, causal=True),
    wide("100 x 1100", 100, 1100, heads=1, dim=48),
    wide("1100 x 100, cache", 1100, 100, heads=1, dim=48, causal=True, bottom_right=True, lse=True),
    *(wide(f"D {d}", 37, 53, dim=d, causal=True) for d in (1, 2, 3, 8, 15, 16, 31, 65, 96, 129, 192, 255)),
    *(wide(f"D {d}, Dv {v}", 70, 70, dim=d, value_dim=v) for d, v in ((7, 256), (128, 1), (40, 72))),
    *(wide(f"bias {b}", 50, 71, batch=2, causal=True, bias=b) for b in product((1, 2), (1, 2), (1, 50), (71,))),
    # One bias for all keys changes nothing: its gradient is zero, so what is left is rounding, in 16 bits most of all.
    *(
        wide(f"bias {b}", 50, 71, batch=2, causal=True, bias=b, dtypes=(torch.float32,))
        for b in product((1, 2), (1, 2), (1, 50), (1,))
    ),
    *(wide(f"mask {b}", 50, 71, batch=2, bias=b, masks=True) for b in ((1, 1, 50, 71), (2, 1, 50, 1), (2, 2, 50, 71))),
    wide("bias over tiles", 300, 400, heads=1, dim=16, bias=(1, 1, 300, 1), dtypes=(torch.float32,)),
    wide("bias by key over tiles", 300, 400, heads=1, dim=16, bias=(1, 1, 1, 400)),
    wide("window over tiles", 700, 700, heads=1, dim=16, causal=True, window=(40, None)),
    wide("window far from the diagonal", 90, 700, heads=1, dim=16, window=(30, 9), bottom_right=True),
    wide("MQA, batches", 60, 90, batch=3, heads=4, kv_heads=1, causal=True, bottom_right=True),
    wide("merged GQA", 130, 130, batch=2, heads=4, kv_heads=2, merged=True, lse=True, sinks=True),
    wide("sinks, rows that see nothing", 90, 30, causal=True, bottom_right=True, sinks=True, lse=True),
    wide("everything", 75, 130, heads=4, kv_heads=2, value_dim=24, causal=True, bottom_right=True, window=(60, None),
         softcap=3.0, bias=(1, 4, 75, 130), alibi=True, sinks=True, lse=True),
    # From 256 rows on float32 may go by other instructions.
    *(
        wide(f"long, D {d}, Dv {v}", 259, 300, heads=1, dim=d, value_dim=v)
        for d, v in ((7, 256), (33, 16), (128, 128), (40, 72))
    ),
    wide("long, merged GQA", 290, 290, heads=4, kv_heads=2, merged=True, causal=True, sinks=True, lse=True),
    wide("long, mask", 261, 300, bias=(1, 2, 261, 300), masks=True),
    wide("long, bias", 261, 300, bias=(1, 2, 261, 300), softcap=5.0),
    wide("long, alibi and dropout", 270, 400, causal=True, bottom_right=True, alibi=True, dropout=0.2),
    wide("long, everything", 275, 330, heads=4, kv_heads=2, value_dim=24, causal=True, bottom_right=True,
         window=(60, None), softcap=3.0, bias=(1, 4, 275, 330), alibi=True, sinks=True, lse=True),
]  # fmt: skip


@pytest.fixture
def one_thread(threads: None) -> None:
    """Small cases gain nothing from more, and wait for them where the machine is busy."""
    torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("case", cases("attention"), ids=ident)
def test_parity(case: Case, dtype: torch.dtype, one_thread: None, each_isa: Iterator[str]) -> None:
    """Every output and every gradient, on every instruction set of this CPU."""
    oracle = Oracle(case, dtype)
    for _ in each_isa:
        oracle.check()


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), [(c, d) for c in WIDE for d in c.dtypes], ids=ident)
def test_parity_on_the_best_instruction_set(case: Case, dtype: torch.dtype, one_thread: None) -> None:
    Oracle(case, dtype).check()


def gradients(function: Callable[..., Any], leaves: list[Tensor], douts: list[Tensor]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in leaves]
    outputs = function(*leaves)
    return [*outputs, *torch.autograd.grad(outputs, leaves, douts)]


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("shape", [(1, 1, 700, 700, 32), (3, 4, 97, 130, 64), (2, 8, 40, 64, 16)], ids=str)
def test_bits_do_not_depend_on_threads_or_repeats(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """One head in chunks of keys; tiles shared by a few heads; whole heads per task."""
    batch, heads, queries, keys, size = shape
    q, dout = (torch.randn(batch, heads, queries, size, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(batch, heads, keys, size, dtype=dtype) for _ in range(2))
    bias, sinks, dlse = torch.randn(heads, 1, keys, dtype=dtype), torch.randn(heads), torch.randn(q.shape[:3])

    def run() -> list[Tensor]:
        def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
            return ops.attention(q, k, v, causal=True, bias=bias, sinks=sinks, return_lse=True)  # type: ignore[return-value]

        return gradients(call, [q, k, v, bias, sinks], [dout, dlse])

    hold_bits(run)


def test_rows_far_apart_in_memory() -> None:
    """Offsets beyond 2^31 elements; only the touched pages exist."""
    memory = torch.empty(2**31 + 4096, dtype=torch.bfloat16)
    q, k, v = (
        memory.as_strided((1, 1, 2, 64), (64, 64, 2**31 + 64, 1), 256 * i).copy_(torch.randn(2, 64)) for i in range(3)
    )
    torch.testing.assert_close(ops.attention(q, k, v), ops.attention(q.clone(), k.clone(), v.clone()), rtol=0, atol=0)


def test_a_huge_row_and_not_a_number_stay_in_their_rows() -> None:
    q, k, v = (torch.randn(1, 2, 40, 32) for _ in range(3))
    plain = ops.attention(q, k, v)
    q[0, 0, 7], q[0, 1, 30] = 1e30, torch.nan
    out = ops.attention(q, k, v)
    assert isinstance(out, Tensor) and isinstance(plain, Tensor)
    assert out[0, 1, 30].isnan().all()
    keep = torch.ones(1, 2, 40, dtype=torch.bool)
    keep[0, 0, 7] = keep[0, 1, 30] = False
    assert torch.equal(out[keep], plain[keep])
    assert out[0, 0, 7].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
def test_a_masked_value_that_is_not_a_number_leaves_the_other_gradients_alone(dtype: torch.dtype) -> None:
    """The padding of a KV cache: no query sees the last keys, and their memory was never written."""
    q, k, v, dout = (torch.randn(2, 2, 70, 32, dtype=dtype) for _ in range(4))

    def call(*tensors: Tensor) -> tuple[Tensor]:
        return (ops.attention(*tensors, causal=True),)  # type: ignore[return-value]

    q, dout = q[:, :, :50], dout[:, :, :50]
    clean = gradients(call, [q, k[:, :, :50], v[:, :, :50]], [dout])
    v[:, :, 50:] = torch.nan
    k[:, :, 50:] = torch.nan
    for got, want in zip(gradients(call, [q, k, v], [dout]), clean, strict=True):
        torch.testing.assert_close(got[:, :, :50], want)
        assert not got[:, :, 50:].any()


def test_memory_layout_follows_the_query() -> None:
    qkv = torch.randn(2, 30, 3, 4, 16, requires_grad=True)
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    out = ops.attention(q, k, v, causal=True)
    assert isinstance(out, Tensor)
    assert out.transpose(1, 2).is_contiguous()
    copies = [t.detach().contiguous() for t in (q, k, v)]
    dense = ops.attention(*copies, causal=True)
    assert isinstance(dense, Tensor) and dense.is_contiguous()
    assert torch.equal(out, dense)


@pytest.mark.slow
def test_registered_ops_pass_opcheck() -> None:
    library = torch.ops.torchweld
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 5)
    merged = torch.randn(2, 9, 4, 8).transpose(1, 2)
    bias, slopes, sinks = torch.randn(4, 1, 12), torch.rand(4), torch.randn(4)
    full = (*Modifiers(bias, slopes, sinks), *Options(0.3, softcap=2.0, left=5, right=0, bottom_right=True, offset=1))
    masked = (*Modifiers(bias > 0, sinks=sinks), *Options(0.3))
    halves = (q.bfloat16(), k.bfloat16(), v.bfloat16())  # whose backward takes the output in float32
    for operands, rest in (((q, k, v), full), ((merged, k, v), masked), (halves, masked)):
        torch.library.opcheck(library.attention.default, (*operands, *rest))
        torch.library.opcheck(library.attention_forward.default, (*operands, *rest, 3))
        out, wide, statistics = library.attention_forward(*operands, *rest, 2)
        assert (wide.shape == out.shape) == (operands is halves)
        saved = (wide if operands is halves else out, statistics)
        arguments = (torch.randn_like(out), torch.randn_like(statistics[0]), *saved, *operands, *rest)
        for mask in (
            [True, True, True, rest is full, False, True],
            [True, False, True, False, False, False],
            [False, True, False, rest is full, False, False],
        ):
            torch.library.opcheck(library.attention_backward.default, (*arguments, mask, True))


def rich(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    return ops.attention(  # type: ignore[return-value]
        q, k, v, causal=True, window=(3, None), softcap=2.0, bias=bias, sinks=sinks, causal_align="bottom_right",
        return_lse=True,
    )  # fmt: skip


def leaves(dtype: torch.dtype) -> list[Tensor]:
    shapes = ((1, 2, 4, 3), (1, 1, 5, 3), (1, 1, 5, 2), (2, 4, 1), (2,))
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


@pytest.mark.slow
def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(rich, leaves(torch.float64))
    assert torch.autograd.gradgradcheck(rich, leaves(torch.float64))


def test_double_backward_of_the_kernels() -> None:
    """A gradient penalty of a float32 call that the kernels served."""
    inputs = leaves(torch.float32)
    with backend.use_backend("reference"):
        exact = penalty(rich, [t.detach().double().requires_grad_() for t in inputs])
    for got, want in zip(penalty(rich, inputs), exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-4, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "compiler"), [("contiguous", "aot_eager"), ("merged", "inductor")])
def test_compiles_to_one_graph(layout: str, compiler: str) -> None:
    q, k, v = (torch.randn(2, 20, 4, 16).transpose(1, 2) for _ in range(3))
    tensors = [t.contiguous() if layout == "contiguous" else t for t in (q, k, v)] + [torch.randn(4, 1, 20)]

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor]:
        out: Any = ops.attention(q, k, v, causal=True, bias=bias, softcap=4.0)
        return (out * 2,)

    dout = [torch.randn(2, 4, 20, 16)]
    eager = gradients(call, tensors, dout)
    compiled = gradients(torch.compile(call, fullgraph=True, backend=compiler), tensors, dout)
    for got, want in zip(compiled, eager, strict=True):
        torch.testing.assert_close(got, want)


def test_what_the_kernels_do_not_take_runs_on_the_reference_and_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_logged", set())
    q = torch.randn(1, 2, 6, 8)
    with caplog.at_level(logging.INFO, logger="torchweld"):
        assert ops.attention(q.double(), q.double(), q.double()) is not None
        assert ops.attention(q, q, q, dropout_p=0.5, alibi_slopes=torch.rand(2, requires_grad=True)) is not None
    assert [r.message.split(": ")[1] for r in caplog.records] == ["query of dtype torch.float64"]


@pytest.mark.parametrize(
    "shape", [(0, 2, 3, 4, 8), (2, 0, 3, 4, 8), (2, 2, 0, 4, 8), (2, 2, 3, 0, 8), (2, 2, 3, 4, 0)], ids=str
)
def test_tensors_without_elements_run_on_the_kernels(shape: tuple[int, ...]) -> None:
    """Nothing to sum: zeros, where there is anything at all. With a head size of 0 all keys weigh the same."""
    batch, heads, queries, keys, size = shape
    sizes = (
        (batch, heads, queries, size),
        (batch, heads, keys, size),
        (batch, heads, keys, 5),
        (heads, queries, keys),
        (heads,),
        (heads,),
    )
    x = [torch.randn(s).requires_grad_() for s in sizes]

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, slopes: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        return ops.attention(q, k, v, bias=bias, alibi_slopes=slopes, sinks=sinks, return_lse=True)  # type: ignore[return-value]

    douts = [torch.randn(batch, heads, queries, 5), torch.randn(batch, heads, queries)]
    with backend.strict():
        ours = gradients(call, x, douts)
    with backend.use_backend("reference"):
        expected = gradients(call, x, douts)
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dim", [*range(8, 257, 8), 1, 3, 17, 33, 61, 127, 253])
def test_head_sizes(dim: int, one_thread: None) -> None:
    """Every multiple of 8, and what is none; values of another size, so that no two sizes can be mixed up."""
    case = wide(f"D {dim}", 7, 19, heads=1, dim=dim, value_dim=264 - dim, causal=True, bottom_right=True)
    for dtype in (torch.float32, torch.bfloat16):
        Oracle(case, dtype).check()


def test_a_bias_of_no_keys_is_not_read(isa: str) -> None:
    query, none, bias = torch.randn(1, 2, 2, 8), torch.randn(1, 2, 0, 8), torch.zeros(1, 2, 2, 0)
    for mask in (bias, bias.bool()):
        out: Any = ops.attention(query, none, none, bias=mask)
        assert out.eq(0).all()
