"""layer_norm, rms_norm and their add_ forms."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from torchweld.bench.functional import works
from torchweld.bench.harness import Settings, Work
from torchweld.testing.layer_norm import LayerNormCase

_CPU = ((8192, 768), (2048, 4096))
_CUDA = ((32768, 768), (32768, 1024), (32768, 2048), (32768, 4096), (32768, 8192), (8192, 16384))
_FEW_HUGE_ROWS = (16, 1 << 22)


def norms(op: str, settings: Settings) -> Iterator[Work]:
    """Every size, dtype and direction of one op."""
    shapes = _CUDA if settings.device == "cuda" else _CPU
    for dtype in settings.dtypes:
        for rows, cols in shapes[:1] if settings.quick else shapes:
            yield from norm_case(op, rows, cols, dtype, settings)
    if settings.device == "cuda" and not settings.quick and torch.float32 in settings.dtypes:
        yield from norm_case(op, *_FEW_HUGE_ROWS, torch.float32, settings)


def norm_case(op: str, rows: int, cols: int, dtype: torch.dtype, settings: Settings) -> Iterator[Work]:
    """One size in both directions."""
    # Bytes per element, with values of `size`: forward reads x and writes y (with a residual: reads that too, writes
    # the sum); backward reads dy and x, writes dx (reads dy, dsum and the sum, writes dx). The rest is small.
    add, rms, size = op.startswith("add"), op.endswith("rms_norm"), rows * cols * dtype.itemsize
    moved = {"forward": 4.0 * size if add else 2.0 * size, "backward": 4.0 * size if add else 3.0 * size}
    case = LayerNormCase(name=f"{rows} x {cols}", regime="bench", rows=(rows,), shape=(cols,), add=add, rms=rms)
    sizes = {"name": case.name, "rows": rows, "cols": cols}
    yield from works(case, sizes, dtype, settings, {direction: {"bytes": n} for direction, n in moved.items()})
