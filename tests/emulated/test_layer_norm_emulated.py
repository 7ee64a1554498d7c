"""The CUDA kernels of layer norm on the emulated GPU (tests/emulation): every code path."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

import torchweld
from layer_norm_cases import COLUMNS, DTYPES, Inputs, check, inputs, run
from leaves import gradient
from torchweld.ops._norm import Norm


@pytest.fixture
def kernels(emulated: ModuleType) -> ModuleType:
    return emulated


@pytest.mark.usefixtures("kernels")
class TestParity:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("cols", COLUMNS)
    def test_columns(self, cols: int, dtype: torch.dtype) -> None:
        rows = max(3, min(70, 20000 // cols))
        check(inputs(rows, cols, dtype, dtype, add=True))

    @pytest.mark.parametrize("cols", [64, 768, 2056, 16392])
    def test_float32_weight_beside_bfloat16(self, cols: int) -> None:
        i = inputs(5, cols, torch.bfloat16, torch.float32, add=True)
        assert i.weight is not None and i.bias is not None
        narrow = i._replace(weight=i.weight.bfloat16(), bias=i.bias.bfloat16())
        wide = narrow._replace(weight=i.weight.bfloat16().float(), bias=i.bias.bfloat16().float())
        check(narrow)
        narrow_found, wide_found = run(narrow), run(wide)
        assert wide_found["output"].dtype == torch.bfloat16 and wide_found["dweight"].dtype == torch.float32
        for name, found in narrow_found.items():
            assert torch.equal(found, wide_found[name].to(found.dtype)), name

    @pytest.mark.parametrize("cols", [64, 768, 2056, 16392])
    def test_without_weight_and_bias(self, cols: int) -> None:
        check(inputs(5, cols, torch.float32, None, add=True))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("cols", [64, 768, 4096])
    def test_unaligned(self, cols: int, dtype: torch.dtype) -> None:
        i = inputs(4, cols, dtype, dtype, add=True, offset=1)
        assert i.x.data_ptr() % 16 != 0 and i.x.is_contiguous()
        check(i)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("cols", [9, 64, 768, 1023, 2049, 2056, 16392])
    def test_dropout_and_residual_dtype(self, cols: int, dtype: torch.dtype) -> None:
        rows = max(3, min(20, 20000 // cols))
        for rms, residual_dtype in ((True, dtype), (False, torch.float32)):
            i = inputs(rows, cols, dtype, dtype, add=True, rms=rms, dropout_p=0.3, residual_dtype=residual_dtype)
            check(i)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("cols", COLUMNS)
    def test_rms_norm(self, cols: int, dtype: torch.dtype) -> None:
        check(inputs(max(3, min(20, 20000 // cols)), cols, dtype, dtype, add=False, rms=True))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("cols", [8193, 16392])
    def test_long_rows_that_fill_the_device(self, kernels: ModuleType, cols: int, dtype: torch.dtype) -> None:
        kernels.set_machine(multiprocessors=1)
        check(inputs(3, cols, dtype, dtype, add=True, rms=dtype is torch.float16, dropout_p=0.2))

    @pytest.mark.parametrize("rms", [False, True])
    @pytest.mark.parametrize("cols", [32769, 65544, 200_000])
    def test_few_long_rows_are_cut(self, cols: int, rms: bool) -> None:
        """Forward in several slabs; backward with several blocks per sum of a row."""
        check(inputs(3, cols, torch.float32, torch.float32, add=False, rms=rms))
        check(inputs(2, cols, torch.bfloat16, torch.float32, add=True, rms=rms, residual_dtype=torch.float32))

    @pytest.mark.parametrize("cols", [200, 6000, 16392, 65544])
    def test_mean_far_above_the_deviation(self, cols: int) -> None:
        check(inputs(4, cols, torch.float32, torch.float32, add=False, mean=4000.0))

    @pytest.mark.parametrize("cols", [200, 6001, 33000])
    @pytest.mark.parametrize("value", [0.1, -3.3e9, 1e30])
    def test_equal_numbers_are_their_mean(self, value: float, cols: int) -> None:
        x = torch.full((2, cols), value)
        assert not torchweld.ops.layer_norm(x, (cols,)).any()
        if value < 1e30:
            assert torchweld.ops.layer_norm(x, (cols,), eps=0.0).isnan().all()

    @pytest.mark.parametrize("cols", [200, 6001, 33000])
    def test_squares_beyond_float32(self, cols: int) -> None:
        assert not torchweld.ops.layer_norm(torch.linspace(-1e30, 1e30, cols)[None], (cols,)).any()

    @pytest.mark.parametrize("rows", [0, 1, 2, 33])
    @pytest.mark.parametrize("cols", [1, 8, 768, 2056, 16392])
    def test_rows(self, rows: int, cols: int) -> None:
        i = inputs(rows, cols, torch.float32, torch.float32, add=False)
        if rows > 0:
            check(i)
        else:
            assert not run(i)["dweight"].any() and not run(i)["dbias"].any()


@pytest.mark.parametrize("cols", [64, 768, 1280, 2049, 2056, 16392])
def test_order_of_threads_does_not_show(kernels: ModuleType, cols: int) -> None:
    """Threads between two barriers run in rising order, then in random order. A race would change the bits."""
    i = inputs(7, cols, torch.bfloat16, torch.bfloat16, add=True)
    rising = run(i)
    for seed in (1, 2, 3):
        kernels.set_machine(seed=seed)
        again = run(i)
        assert all(torch.equal(rising[k], again[k]) for k in rising)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("cols", [8, 768, 2049, 2056, 16392])
@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_wanted_gradients(cols: int, wanted: tuple[bool, bool, bool]) -> None:
    i = inputs(5, cols, torch.float32, torch.float32, add=False)
    every = run(i)
    assert i.weight is not None and i.bias is not None
    x, weight, bias = (t.requires_grad_(want) for t, want in zip((i.x, i.weight, i.bias), wanted, strict=True))
    (torchweld.ops.layer_norm(x, (cols,), weight, bias) * i.doutput).sum().backward()
    for name, leaf, want in zip(("dx", "dweight", "dbias"), (x, weight, bias), wanted, strict=True):
        assert (leaf.grad is not None) == want
        if want:
            assert torch.equal(gradient(leaf), every[name])


@pytest.mark.parametrize("shared", [101376, 232448])
def test_less_shared_memory(kernels: ModuleType, shared: int) -> None:
    """12 thousand columns fit the shared memory of capability 8.6; 13 thousand do not and are cut into slabs."""
    kernels.set_machine(shared_bytes_per_block=shared)
    for cols in (12288, 13312):
        check(inputs(3, cols, torch.bfloat16, torch.bfloat16, add=True))


@pytest.mark.parametrize("cols", [1, 64, 100, 768, 2048, 2056, 16384, 16392, 1 << 20])
@pytest.mark.parametrize("rows", [0, 1, 4096, 1 << 20])
def test_workspace(kernels: ModuleType, rows: int, cols: int) -> None:
    kernels.set_machine(multiprocessors=132)
    with_weights = kernels.layer_norm_workspace(rows, cols, True, 0)
    sums = kernels.layer_norm_workspace(rows, cols, False, 0)
    assert sums * 2 * cols >= 4 * rows if cols > 2048 else sums == 0
    assert 1 <= with_weights - sums <= max(1, rows, 1) and with_weights - sums <= 16 * 132
    assert (with_weights - sums) * cols <= 16 * 132 * 2048, "the partials must stay in L2"


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("cols", [64, 768, 16392])
def test_without_statistics(cols: int) -> None:
    """Without gradients mean and rstd are not stored, and the output has the same bits."""
    i = inputs(5, cols, torch.bfloat16, torch.bfloat16, add=False)
    with torch.no_grad():
        output = torchweld.ops.layer_norm(i.x, (cols,), i.weight, i.bias)
    assert torch.equal(output, run(i)["output"])


@pytest.mark.usefixtures("kernels")
def test_a_long_row_of_large_mean() -> None:
    """The variance is computed about the mean: 1e4 +- 1 keeps its digits."""
    generator = torch.Generator().manual_seed(0)
    for cols in (768, 20000):
        x = 1e4 + torch.randn(2, cols, generator=generator)
        y = torchweld.ops.layer_norm(x, (cols,))
        expected = torch.nn.functional.layer_norm(x.double(), (cols,))
        assert (y.double() - expected).abs().max() < 2e-3


@pytest.mark.usefixtures("kernels")
def test_nan_stays_in_its_row() -> None:
    i = inputs(9, 64, torch.float32, None, add=False)
    clean = run(i)
    i.x[4, 7] = float("nan")
    dirty = run(i)
    others = [m for m in range(9) if m != 4]
    for name in ("output", "dx"):
        assert torch.equal(clean[name][others], dirty[name][others]) and dirty[name][4].isnan().all()


def test_a_forward_without_its_workspace_is_refused(kernels: ModuleType) -> None:
    x = torch.ones(2, 20000)
    assert kernels.layer_norm_forward_workspace(2, 20000, 0) == 3 * 2 * 3
    message = r"\[layer_norm_forward\] workspace: expected at least 12 elements, but got 0"
    with pytest.raises(ValueError, match=message):
        kernels.layer_norm_forward(x, None, None, None, None, Norm(20000, 1e-5), None, x.clone(), None, None)


def test_too_small_a_workspace_is_refused(kernels: ModuleType) -> None:
    i: Inputs = inputs(4, 20000, torch.float32, torch.float32, add=False)
    assert i.weight is not None
    stats, d = torch.ones(2, 4), torch.empty(20000)
    with pytest.raises(ValueError, match=r"\[layer_norm_backward\] partial: expected at least 2 blocks, but got 1"):
        kernels.layer_norm_backward(
            doutput=i.doutput,
            dsum=None,
            input=i.x,
            weight=i.weight,
            stats=stats,
            seed=None,
            norm=Norm(20000, 1e-5),
            dinput=i.x,
            dx=None,
            dweight=d,
            dbias=d,
            partial=torch.empty(1, 2, 20000),
        )
