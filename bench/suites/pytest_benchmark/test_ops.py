"""The measurements of `torchweld bench` under pytest-benchmark, for whoever tracks history with its files.

    pytest bench/suites/pytest_benchmark --benchmark-json now.json -k "layer_norm and torchweld"

$TORCHWELD_BENCH_DEVICE: cpu (default) or cuda. Each result is held to the accuracy rule before it is timed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from torchweld import backend
from torchweld.bench.command import sources
from torchweld.bench.harness import Settings

_SETTINGS = Settings(device=os.environ.get("TORCHWELD_BENCH_DEVICE", "cpu"), quick=True)
_PROVIDERS = ("torchweld", "torch")


def _works() -> Iterator[Any]:
    for op, source in sources().items():
        if op == "overhead":  # it changes the number of threads while its works are drawn
            continue
        for work in source(_SETTINGS):
            dtype = str(work.dtype).removeprefix("torch.")
            yield pytest.param(work, id=f"{op}-{work.direction}-{dtype}-{work.case['name']}")


@pytest.fixture(scope="module", autouse=True)
def kept_memory() -> None:
    """As in `torchweld bench`: the times hold no page faults."""
    from torchweld.memory import keep_memory  # noqa: PLC0415

    keep_memory()


@pytest.mark.parametrize("provider", _PROVIDERS)
@pytest.mark.parametrize("work", _works())
def test_op(work: Any, provider: str, benchmark: Any) -> None:
    try:
        errors = work.check()
    except backend.NotServedError as error:
        pytest.skip(str(error))
    call = work.calls()[provider]
    benchmark.group = f"{work.op} {work.direction} {work.case['name']} {work.dtype}"
    benchmark.extra_info |= {"op": work.op, "case": work.case, "provider": provider, "max_error": errors.get(provider)}

    def synchronized() -> None:
        call()
        if _SETTINGS.device == "cuda":
            torch.cuda.synchronize()

    benchmark(synchronized)
