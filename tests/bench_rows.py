"""Rows as `torchweld bench --json` writes them, without measuring."""

from __future__ import annotations

from typing import Any

import torch

from torchweld.bench.harness import Settings, Work, _row
from torchweld.bench.report import Row


def row(ms: float, provider: str = "torchweld", *, noise: float = 0.02, **changes: Any) -> Row:
    """A row of layer_norm whose percentiles are `noise` from the median, with `changes`."""
    work = Work("layer_norm", "forward", torch.float32, {"name": "8192 x 768", "rows": 8192, "cols": 768}, dict)
    times = {"median_ms": ms, "p20_ms": ms * (1 - noise), "p80_ms": ms * (1 + noise)}
    rates = {"gbytes_per_s": 50.0 / ms, "share_of_limit": 0.8 / ms, "speedup_vs_torch": 2.0 / ms, "max_error": 1e-6}
    found = _row(work, Settings(), provider, {**times, **rates, "torch_max_error": 2e-6})
    return {**found, "device": "A CPU", "versions": {"torchweld": "0", "torch": "2.13.0", "threads": 2}, **changes}


def rows() -> list[Row]:
    """Two ops beside two rivals, in two directions and dtypes; one result is wrong."""
    found = []
    for op, limited in (("layer_norm", {}), ("attention", {"gbytes_per_s": None, "gflops": 300.0})):
        for size, case in enumerate(("8 x 64", "512 x 768", "8192 x 768 <padded> & causal, window 256, dropout 0.1")):
            for direction in ("forward", "backward"):
                for dtype in ("float32", "bfloat16"):
                    what: dict[str, Any] = {
                        "op": op,
                        "direction": direction,
                        "dtype": dtype,
                        "case": {"name": case},
                        **limited,
                    }
                    ours = 0.3 * 3**size
                    for provider, ms in (("torchweld", ours), ("torch", 2.0 * ours), ("torch:flash", 0.9 * ours)):
                        rates = {"speedup_vs_torch": 2.0 * ours / ms, "share_of_limit": 0.8 * ours / ms}
                        found.append(row(ms, provider, **what, **rates))
    return [*found, wrong("layer_norm", "1 x 1")]


def wrong(op: str, case: str) -> Row:
    """The row of a result that broke the rule."""
    empty: dict[str, Any] = dict.fromkeys(
        ("median_ms", "p20_ms", "p80_ms", "gbytes_per_s", "share_of_limit", "speedup_vs_torch")
    )
    return row(
        1.0, op=op, case={"name": case}, wrong=f"[{op}] case '{case}', output: off by 1", max_error=None, **empty
    )
