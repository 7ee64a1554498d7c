"""Runs small cases of every op under AddressSanitizer and UndefinedBehaviorSanitizer: python -m emulation.sanitized."""

from __future__ import annotations

import re
import subprocess
from contextlib import suppress

from emulation import build
from torchweld import backend
from torchweld.testing import Case
from torchweld.testing.cases import evaluate, ops

SMALL = 1 << 13  # elements of a case's inputs


def environment() -> dict[str, str]:
    """Python itself is not instrumented, so the library that watches memory must be there before it."""
    library = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    return {
        "LD_PRELOAD": library.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def served_ops() -> dict[str, tuple[Case, ...]]:
    """The ops of torchweld.testing that have CUDA kernels: add_layer_norm has layer_norm's, adamw is called adamw_."""
    launchers = re.findall(r"^void (\w+)\(", (build.CSRC / "cuda/kernels.h").read_text(), re.MULTILINE)
    return {
        op: cases
        for op, cases in ops().items()
        if any(launcher.startswith(op.removeprefix("add_")) for launcher in launchers)
    }


def main() -> None:
    module = build.load(build.SANITIZED)
    backend.kernels["cpu"] = module
    counts: dict[str, int] = dict.fromkeys(served_ops(), 0)
    for op, cases in served_ops().items():
        for case in cases:
            inputs = case.inputs(case.dtypes[counts[op] % len(case.dtypes)])
            if sum(t.numel() for t in inputs.values()) <= SMALL:
                module.set_machine(4, 232448, counts[op])
                with suppress(backend.NotServedError), backend.strict():
                    evaluate(case, case.ours, inputs)
                    counts[op] += 1
    assert all(counts.values()), counts
    print(f"every case is clean: {counts}")


if __name__ == "__main__":
    main()
