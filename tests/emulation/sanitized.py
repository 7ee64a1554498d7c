"""Runs small cases of every op under AddressSanitizer and UndefinedBehaviorSanitizer: python -m emulation.sanitized."""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch

from emulation import build
from torchweld import backend
from torchweld.testing import Case
from torchweld.testing.case import evaluate
from torchweld.testing.cases import ops

# Ops that use the kernels of another name.
FAMILIES = {
    **dict.fromkeys(("add_layer_norm", "rms_norm", "add_rms_norm"), "layer_norm"),
    **dict.fromkeys(("swiglu", "geglu"), "gated"),
    "linear_cross_entropy": "cross_entropy",
}


def environment() -> dict[str, str]:
    """The variables that preload the sanitizer's library, because Python itself is not instrumented.

    The C++ library is preloaded too: the sanitizer intercepts its exceptions.
    """
    names = ("libasan.so", "libstdc++.so")
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in names
    ]
    return {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def small_cases(limit: int) -> Iterator[tuple[Case, torch.dtype]]:
    """The cases of the ops with CUDA kernels whose inputs have no more than `limit` elements, in every dtype.

    Cases that clip are left out: the norm's thousand blocks take seconds. test_adamw_emulated.py has one of them.
    """
    launchers = re.findall(r"^void (\w+)\(", (build.CSRC / "cuda/kernels.h").read_text(), re.MULTILINE)
    for op, cases in ops().items():
        family = FAMILIES.get(op, op)
        if not any(launcher.startswith(family) for launcher in launchers):
            continue
        for case in cases:
            for dtype in () if getattr(case, "max_grad_norm", None) else case.dtypes:
                if sum(t.numel() for t in case.inputs(dtype).values()) <= limit:
                    yield case, dtype


def main() -> None:
    module: Any = build.load(build.SANITIZED)
    backend.kernels["cpu"] = module
    clean: dict[str, int] = defaultdict(int)
    for number, (case, dtype) in enumerate(list(small_cases(1 << 13))[::2]):  # one or two of a case's three dtypes
        module.set_machine(seed=number, capability=(80, 90)[number % 2])
        with suppress(backend.NotServedError), backend.strict():
            evaluate(case, case.ours, case.inputs(dtype))
            clean[case.op] += 1
    print(f"every case is clean: {dict(clean)}")


if __name__ == "__main__":
    main()
