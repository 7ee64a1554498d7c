"""Every op with CUDA kernels, on the emulated GPU (tests/emulation)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from types import ModuleType

import pytest
import torch

from emulation import build, sanitized
from torchweld import backend
from torchweld.testing import Case, Oracle
from torchweld.testing.case import evaluate

SEEDS = (1, 2)  # of the schedule, beside the one in order
# The products of attention are slow here: test_attention_emulated.py has its cases.
CASES = [(case, dtype) for case, dtype in sanitized.small_cases(1 << 17) if case.op != "attention"]
IDS = [f"{case.op}: {case.name}-{str(dtype)[6:]}" for case, dtype in CASES]


@pytest.mark.parametrize(("case", "dtype"), CASES, ids=IDS)
def test_parity_and_the_same_bits_on_every_schedule(case: Case, dtype: torch.dtype, emulated: ModuleType) -> None:
    oracle = Oracle(case, dtype)
    try:
        oracle.check()
    except backend.NotServedError as refusal:
        pytest.skip(refusal.reason)
    expected = evaluate(case, case.ours, oracle.inputs[0])
    for seed in SEEDS:
        emulated.set_machine(seed=seed)
        for name, found in evaluate(case, case.ours, oracle.inputs[0]).items():
            ours, first = (t.reshape(-1).view(torch.uint8) for t in (found, expected[name]))
            assert torch.equal(ours, first), f"{name}, seed {seed}"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs the compiler's own sanitizers")
def test_kernels_are_clean_under_the_sanitizers() -> None:
    """AddressSanitizer finds accesses outside of tensors, UndefinedBehaviorSanitizer undefined behaviour."""
    if reason := build.unavailable():
        pytest.skip(f"the CUDA kernels cannot be built for the CPU: {reason}")
    found = subprocess.run(
        [sys.executable, "-m", "emulation.sanitized"],
        env=os.environ | sanitized.environment(),
        cwd=build.HERE.parent,
        check=False,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    for op in {"attention", *(case.op for case, _ in CASES)}:
        assert re.search(f"every case is clean:.*'{op}': \\d+", found.stdout), found.stdout


def test_the_emulated_suite_reaches_the_kernels(kernel_lines: dict[str, dict[int, int]]) -> None:
    """At least 90 % of the lines of csrc/cuda have run. The end of the report lists the others."""
    from emulation.coverage import share, table  # noqa: PLC0415  (measured only where the whole suite runs)

    assert share(kernel_lines) >= 0.9, "\n".join(table(kernel_lines))
