"""Which kernels run, and what is said when the wanted ones cannot."""

from __future__ import annotations

import logging
import subprocess
from typing import Any

import pytest
import torch

import fresh
import torchweld
from torchweld import backend, ops, reference


def call(**environment: str) -> subprocess.CompletedProcess[str]:
    script = (
        "import torch, torchweld; x = torch.ones(2, 4, dtype=torch.{}); torchweld.ops.layer_norm(x, (4,)); print('ran')"
    )
    dtype = environment.pop("dtype", "float32")
    return fresh.python(script.format(dtype), **environment)


def test_the_cpu_kernels_serve_the_cpu() -> None:
    assert backend.active("cpu") == "cpu"
    assert backend.active("meta") == "reference"


def test_use_backend_forces_and_restores() -> None:
    x = torch.randn(33, 517)
    ours, definition = ops.layer_norm(x, (517,)), reference.layer_norm(x, (517,))
    assert not torch.equal(ours, definition)  # other bits: the kernel's sums have another order
    with torchweld.use_backend("reference"):
        assert torch.equal(ops.layer_norm(x, (517,)), definition)
        with torchweld.use_backend("cpu"):
            assert torch.equal(ops.layer_norm(x, (517,)), ours)
        assert backend.active("cpu") == "reference"
    assert backend.active("cpu") == "cpu"


def test_use_backend_restores_after_an_error() -> None:
    with pytest.raises(KeyError), torchweld.use_backend("reference"):
        raise KeyError
    assert backend.active("cpu") == "cpu"


def test_an_unknown_backend_is_named() -> None:
    with (
        pytest.raises(ValueError, match="unknown backend 'gpu'; expected one of cuda, cpu, reference"),
        torchweld.use_backend("gpu"),
    ):
        pass
    result = call(TORCHWELD_BACKEND="gpu")
    assert result.returncode != 0
    assert "TORCHWELD_BACKEND: unknown backend 'gpu'" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_backend_that_is_not_there_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"backend 'cuda' cannot be used here: .+"), torchweld.use_backend("cuda"):
        pass


def test_a_forced_backend_refuses_tensors_from_elsewhere() -> None:
    with (
        torchweld.use_backend("cpu"),
        pytest.raises(RuntimeError, match="backend 'cpu' is forced, but the tensors are on 'meta'"),
    ):
        ops.layer_norm(torch.ones(2, 4, device="meta"), (4,))


def test_the_environment_forces_too() -> None:
    assert call(TORCHWELD_BACKEND="reference").stdout == "ran\n"
    assert call(TORCHWELD_BACKEND="cpu", dtype="float64").stdout == "ran\n"


def test_strict_raises_where_a_kernel_does_not_serve() -> None:
    assert call(TORCHWELD_STRICT="1").stdout == "ran\n"
    result = call(TORCHWELD_STRICT="1", dtype="float64")
    assert result.returncode != 0
    assert "[layer_norm] the cpu kernels do not serve this call: input of dtype torch.float64" in result.stderr


def test_a_call_on_the_reference_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    backend._logged.clear()
    x = torch.ones(2, 4, dtype=torch.float64)
    with caplog.at_level(logging.INFO, logger="torchweld"):
        for _ in range(3):
            ops.layer_norm(x, (4,))
    messages = [r.getMessage() for r in caplog.records]
    assert messages == ["[layer_norm] runs on the reference: input of dtype torch.float64"]


def test_a_broken_module_is_reported_by_its_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backend._modules, "cpu", (None, "torchweld._cpu does not load: undefined symbol"))
    monkeypatch.delitem(backend.kernels, "cpu")
    with pytest.raises(RuntimeError, match="does not load: undefined symbol"):
        ops.layer_norm(torch.ones(2, 4), (4,))
    with torchweld.use_backend("reference"):
        assert ops.layer_norm(torch.ones(2, 4), (4,)).shape == (2, 4)


def test_a_tensor_without_memory_never_reaches_a_kernel() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: PLC0415

    from torchweld import _cpu  # noqa: PLC0415
    from torchweld.ops._norm import Norm  # noqa: PLC0415

    with FakeTensorMode():
        fake = torch.randn(4, 8)
    assert ops.layer_norm(fake, (8,)).shape == (4, 8)
    rest = (None, None, None, None, Norm(8, 1e-5), None, torch.empty(4, 8), None, None)
    with pytest.raises(BufferError, match="FakeTensor has no memory of its own"):
        _cpu.layer_norm_forward(fake, *rest)
    with pytest.raises(TypeError, match=r"\[layer_norm_forward\] input: expected a torch.Tensor, but got list"):
        wrong: Any = [1.0]
        _cpu.layer_norm_forward(wrong, *rest)


def test_a_subclass_of_tensor_is_served() -> None:
    class Tagged(torch.Tensor):
        pass

    x = torch.randn(4, 8)
    y = ops.layer_norm(x.as_subclass(Tagged), (8,))
    assert torch.equal(y.as_subclass(torch.Tensor), ops.layer_norm(x, (8,)))
