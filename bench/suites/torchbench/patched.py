"""A model of torchbench as it is beside the same model after `torchweld.patch`.

    python bench/suites/torchbench/patched.py --checkout benchmark nanogpt --test train --device cpu

Both are timed in turn, one call of the suite's `invoke` each per round. Results are compared first.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

import torchweld
from torchweld.memory import keep_memory

TOLERANCE = {
    torch.float32: 1e-3,
    torch.bfloat16: 2e-2,
    torch.float16: 1e-2,
}  # torchbenchmark/util/env_check.py, by dtype


def load(checkout: Path, name: str, test: str, device: str, batch_size: int | None) -> Any:
    """The suite's model."""
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    from torchbenchmark import load_model_by_name  # noqa: PLC0415  (a checkout)

    before = Path.cwd()
    try:
        return load_model_by_name(name)(test=test, device=device, batch_size=batch_size)
    finally:
        os.chdir(before)


def patched(checkout: Path, name: str, test: str, device: str, batch_size: int | None) -> tuple[Any, torchweld.Report]:
    """The suite's model with torchweld's layers, and what was swapped."""
    model = load(checkout, name, test, device, batch_size)
    module, _ = model.get_module()
    return model, torchweld.patch(module)


def difference(stock: Any, ours: Any) -> float:
    """The largest of the results of both on the same inputs, as a share of the largest number."""
    results, (_, inputs) = [], stock.get_module()
    for model in (stock, ours):
        module, _ = model.get_module()
        with torch.no_grad():
            results.append(_tensors(module(**inputs) if isinstance(inputs, dict) else module(*inputs)))
    pairs = [(a.double(), b.double()) for a, b in zip(*results, strict=True)]
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) for a, b in pairs)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [t for each in value for t in _tensors(each)] if isinstance(value, (list, tuple)) else []


def compare(stock: Any, ours: Any, seconds: float) -> dict[str, Any]:
    """Milliseconds of each, from interleaved rounds, and the ratio."""
    times: dict[str, list[float]] = {"torch": [], "torchweld": []}
    for model in (stock, ours):
        model.invoke()
    start = time.perf_counter()
    while len(times["torch"]) < 5 or time.perf_counter() - start < seconds:
        for name, model in (("torch", stock), ("torchweld", ours)):
            began = time.perf_counter()
            model.invoke()
            if model.device == "cuda":
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - began) * 1e3)
    ratios = [a / b for a, b in zip(times["torch"], times["torchweld"], strict=True)]
    fifths = quantiles(ratios, n=5)
    found = {f"{name}_ms": median(each) for name, each in times.items()}
    return {**found, "speedup": median(ratios), "speedup_p20": fifths[0], "speedup_p80": fifths[-1]}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--checkout", type=Path, required=True, help="of github.com/pytorch/benchmark")
    parser.add_argument("--test", choices=("train", "eval"), default="eval")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--seconds", type=float, default=10.0)
    args = parser.parse_args(argv)
    keep_memory()
    given = (args.checkout.resolve(), args.model, args.test, args.device, args.batch_size)
    stock, (ours, report) = load(*given), patched(*given)
    print(report, file=sys.stderr)
    found: dict[str, Any] = {"model": args.model, "test": args.test, "device": args.device}
    if args.test == "eval":
        found["difference"] = difference(stock, ours)
        limit = TOLERANCE[next(stock.get_module()[0].parameters()).dtype]
        if found["difference"] > limit:
            print(f"expected results within {limit}, but got {found['difference']:.1e}", file=sys.stderr)
            return 1
    print(json.dumps({**found, **compare(stock, ours, args.seconds)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
