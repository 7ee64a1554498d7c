"""torchweld as a kernel of Hugging Face's `kernels`: its benchmark runs and agrees, and layers get its forward."""

from __future__ import annotations

import base64
import hashlib
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from torchweld import ops

SUITE = Path(__file__).resolve().parents[2] / "bench" / "suites" / "kernels"


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    stage = runpy.run_path(str(SUITE / "stage.py"))["stage"]
    assert stage(tmp_path / "kernel") == tmp_path / "kernel"
    return tmp_path / "kernel"


def test_metadata_has_the_digests_of_the_files(staged: Path) -> None:
    for folder in (staged / "build").iterdir():
        found = json.loads((folder / "metadata.json").read_text())
        assert folder.name == f"torch-{found['backend']['type']}"
        assert set(found["digest"]["files"]) == {"__init__.py", "layers.py"}
        for name, digest in found["digest"]["files"].items():
            assert base64.b64decode(digest) == hashlib.sha256((folder / name).read_bytes()).digest()


@pytest.mark.filterwarnings("ignore")  # of the packages that it imports
def test_their_runner_verifies_every_workload(staged: Path) -> None:
    benchmark = pytest.importorskip("kernels.cli.benchmark", reason="kernels[benchmark] is not installed")
    if benchmark.MISSING_DEPS:
        pytest.skip(f"kernels benchmark needs {', '.join(benchmark.MISSING_DEPS)}")
    found = benchmark.run_benchmark(str(staged), None, None, iterations=2, warmup=1)
    timings = found.timing_results
    assert len(timings) == 7 and all(timing.verified for timing in timings.values())


@pytest.mark.filterwarnings("ignore")
def test_kernelize_gives_layers_our_forward(staged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels: Any = pytest.importorskip("kernels", reason="kernels is not installed")
    mapping = runpy.run_path(str(SUITE / "mapping.py"))["mapping"](staged)

    @kernels.use_kernel_forward_from_hub("RMSNorm")
    class Norm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.rand(24))
            self.variance_epsilon = 1e-6

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.rms_norm(hidden_states, (24,), self.weight, self.variance_epsilon)

    model, x = torch.nn.Sequential(Norm()), torch.randn(5, 24)
    wanted = model(x)
    with kernels.use_kernel_mapping(mapping):
        kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu", use_fallback=False)
    calls, real = [], ops.rms_norm

    def counting(*given: Any) -> torch.Tensor:
        calls.append(given)
        return real(*given)

    monkeypatch.setattr(ops, "rms_norm", counting)
    torch.testing.assert_close(model(x), wanted)
    assert len(calls) == 1
