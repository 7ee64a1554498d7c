"""layer_norm and add_layer_norm on a GPU: parity by path, streams, devices, graphs, and the same bits every time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import torchweld
from layer_norm_cases import COLUMNS, DTYPES, check, inputs, run
from torchweld import backend
from torchweld.ops._norm import Norm

_REASON = backend.unavailable("cuda")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(_REASON is not None, reason=f"needs an NVIDIA GPU and torchweld._cuda: {_REASON}"),
]


@pytest.fixture(autouse=True)
def only_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a call would fall back to the reference."""
    monkeypatch.setattr(backend._settings, "strict", True)
    monkeypatch.setattr(backend._settings, "loaded", True)


class TestParity:
    @pytest.mark.parametrize("add", [False, True], ids=["plain", "add"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("cols", [*COLUMNS, 65537, (1 << 20) + 8])
    def test_columns(self, cols: int, dtype: torch.dtype, add: bool) -> None:
        rows = max(3, min(3000, 1_000_000 // cols))
        check(inputs(rows, cols, dtype, dtype, add=add, device="cuda"))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("cols", [9, 64, 768, 1023, 2049, 4096, 16392, (1 << 20) + 8])
    def test_rms_norm_dropout_and_residual_dtype(self, cols: int, dtype: torch.dtype) -> None:
        rows = max(3, min(3000, 1_000_000 // cols))
        check(inputs(rows, cols, dtype, dtype, add=False, device="cuda", rms=True))
        for rms, residual_dtype in ((True, dtype), (False, torch.float32)):
            check(
                inputs(
                    rows,
                    cols,
                    dtype,
                    dtype,
                    add=True,
                    device="cuda",
                    rms=rms,
                    dropout_p=0.3,
                    residual_dtype=residual_dtype,
                )
            )

    def test_few_huge_rows(self) -> None:
        check(inputs(16, 1 << 22, torch.float32, torch.float32, add=False, device="cuda"))

    @pytest.mark.parametrize("rows", [0, 1, 2, 131, 132, 133, 20000])
    @pytest.mark.parametrize("cols", [1, 64, 768, 2056, 16392])
    def test_rows(self, rows: int, cols: int) -> None:
        i = inputs(min(rows, 20_000_000 // cols), cols, torch.bfloat16, torch.bfloat16, add=True, device="cuda")
        if rows > 0:
            check(i)
        else:
            found = run(i)
            assert not found["dweight"].any() and not found["dbias"].any()

    @pytest.mark.parametrize("cols", [64, 768, 2056, 16392])
    def test_float32_weight_beside_bfloat16(self, cols: int) -> None:
        i = inputs(50, cols, torch.bfloat16, torch.bfloat16, add=True, device="cuda")
        assert i.weight is not None and i.bias is not None
        wide = run(i._replace(weight=i.weight.float(), bias=i.bias.float()))
        assert wide["output"].dtype == torch.bfloat16 and wide["dweight"].dtype == torch.float32
        for name, found in run(i).items():
            assert torch.equal(found, wide[name].to(found.dtype)), name

    @pytest.mark.parametrize("cols", [64, 768, 2056, 16392])
    def test_without_weight_and_bias(self, cols: int) -> None:
        check(inputs(50, cols, torch.float32, None, add=True, device="cuda"))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("cols", [64, 768, 4096, 16384])
    def test_unaligned(self, cols: int, dtype: torch.dtype) -> None:
        i = inputs(20, cols, dtype, dtype, add=True, device="cuda", offset=1)
        assert i.x.data_ptr() % 16 != 0 and i.x.is_contiguous()
        check(i)

    def test_non_contiguous(self) -> None:
        i = inputs(64, 512, torch.bfloat16, torch.bfloat16, add=False, device="cuda")
        check(i._replace(x=i.x.t().contiguous().t(), doutput=i.doutput.t().contiguous().t()))

    def test_large_mean(self) -> None:
        x = 1e4 + torch.randn(64, 4096, device="cuda")
        y = torchweld.ops.layer_norm(x, (4096,))
        assert (y.double() - torch.nn.functional.layer_norm(x.double(), (4096,))).abs().max() < 2e-3

    def test_more_than_2_to_31_elements(self) -> None:
        rows, cols = (1 << 21) + 3, 1032
        if torch.cuda.mem_get_info()[0] < 20e9:
            pytest.skip("needs 20 GB of free GPU memory")
        x = torch.zeros(rows, cols, dtype=torch.bfloat16, device="cuda")
        x[-1] = torch.randn(cols, device="cuda")
        y = torchweld.ops.layer_norm(x, (cols,))
        assert torch.equal(y[-1], torchweld.ops.layer_norm(x[-1], (cols,)))
        assert y[-1].float().std() > 0.9 and not y[:-1].any()


@pytest.mark.parametrize("cols", [64, 768, 1280, 2049, 4096, 16392])
def test_same_bits_every_time(cols: int) -> None:
    i = inputs(3000, cols, torch.bfloat16, torch.bfloat16, add=True, device="cuda")
    first = run(i)
    for _ in range(10):
        again = run(i)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_current_stream_is_used() -> None:
    """The kernel must wait for earlier work of its own stream, and not for the default stream."""
    x = torch.zeros(4096, 4096, device="cuda")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.copy_(torch.arange(4096, device="cuda", dtype=torch.float32).expand_as(x))
        y = torchweld.ops.layer_norm(x, (4096,))
    stream.synchronize()
    assert torch.equal(y, torchweld.ops.layer_norm(x, (4096,))) and y.abs().max() > 1


@pytest.mark.parametrize("cols", [768, 4096, 16392])
def test_cuda_graph(cols: int) -> None:
    i = inputs(100, cols, torch.bfloat16, torch.bfloat16, add=True, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(i)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(i)
    other = inputs(100, cols, torch.bfloat16, torch.bfloat16, add=True, device="cuda", seed=1)
    for mine, new in zip(i, other, strict=True):
        if isinstance(mine, Tensor) and isinstance(new, Tensor):
            mine.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    expected = run(other)
    assert all(torch.equal(captured[name], expected[name]) for name in expected)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_no_sync() -> None:
    x = torch.randn(256, 768, device="cuda")
    torchweld.ops.layer_norm(x, (768,))
    torch.cuda.synchronize()
    previous = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torchweld.ops.layer_norm(x, (768,))
    finally:
        torch.cuda.set_sync_debug_mode(previous)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_second_device() -> None:
    i = inputs(100, 768, torch.bfloat16, torch.bfloat16, add=True, device="cuda:1")
    assert torch.cuda.current_device() == 0
    check(i)
    assert torch.cuda.current_device() == 0
    here = run(inputs(100, 768, torch.bfloat16, torch.bfloat16, add=True, device="cuda:0"))
    assert all(torch.equal(here[name], there.to("cuda:0")) for name, there in run(i).items())


def test_tensors_of_another_device_are_refused() -> None:
    module = backend.module(torch.device("cuda"))
    x = torch.randn(4, 8, device="cuda")
    with pytest.raises(ValueError, match=r"\[layer_norm_forward\] output: expected a tensor on cuda:0, but got cpu"):
        module.layer_norm_forward(x, None, None, None, None, Norm(8, 1e-5), None, x.cpu(), None, None)


@pytest.mark.filterwarnings("ignore")
def test_compiles() -> None:
    """torch.compile sees one op forward and one backward, and gives the same bits as eager mode."""
    i = inputs(64, 768, torch.bfloat16, torch.bfloat16, add=True, device="cuda")
    assert i.residual is not None
    compiled = torch.compile(torchweld.ops.add_layer_norm, fullgraph=True)
    ours = compiled(i.x, i.residual, (768,), i.weight, i.bias)
    eager = torchweld.ops.add_layer_norm(i.x, i.residual, (768,), i.weight, i.bias)
    assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))
