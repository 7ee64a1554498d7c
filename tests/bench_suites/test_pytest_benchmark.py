"""The measurements of `torchweld bench` under pytest-benchmark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).resolve().parents[2] / "bench" / "suites" / "pytest_benchmark"


@pytest.mark.slow
def test_its_file_has_both_sides_of_a_measurement(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    file = tmp_path / "now.json"
    words = [sys.executable, "-m", "pytest", str(SUITE), "-p", "no:cacheprovider", "-q", "-W", "ignore"]
    words += ["-k", "overhead or (layer_norm-forward-float32 and not add)", "--benchmark-json", str(file)]
    words += ["--benchmark-max-time", "0.05", "--benchmark-min-rounds", "2"]
    done = subprocess.run(words, cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    found = json.loads(file.read_text())["benchmarks"]
    assert [each["extra_info"]["provider"] for each in found] == ["torchweld", "torch"]
    assert all(each["extra_info"]["op"] == "layer_norm" and each["stats"]["median"] > 0 for each in found)
    assert len({each["group"] for each in found}) == 1
