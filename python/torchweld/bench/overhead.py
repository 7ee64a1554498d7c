"""The cost of a call without its work, and of an import: layer_norm of 8 x 64, and a fresh Python."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import torch

from torchweld import ops
from torchweld.bench.harness import Call, Settings, Work
from torchweld.testing import Oracle, confirm
from torchweld.testing.case import Tensors
from torchweld.testing.layer_norm import LayerNormCase

_REPEATS = 100  # calls per sample: one is too short for the clock


def _calls(x: Tensors, grad: bool) -> dict[str, Call]:
    # A call as a user writes it, without the code that the cases wrap around a call.
    inputs, weight, bias = (x[n].detach().requires_grad_(grad) for n in ("x", "weight", "bias"))
    ours, theirs, shape = ops.layer_norm, torch.nn.functional.layer_norm, (64,)
    return {
        "torchweld": lambda: ours(inputs, shape, weight, bias, 1e-5),
        "torch": lambda: theirs(inputs, shape, weight, bias, 1e-5),
    }


def _python(program: str) -> Call:
    return lambda: subprocess.run([sys.executable, "-c", program], check=True)


def overhead(settings: Settings) -> Iterator[Work]:
    """Measures on one thread, for a second one costs more than it gains. Restores the number of threads at the end."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from _works(settings)
    finally:
        torch.set_num_threads(threads)


def _works(settings: Settings) -> Iterator[Work]:
    """layer_norm with and without a graph for autograd; then `import torch` beside `import torch, torchweld`."""
    case = LayerNormCase(name="8 x 64", regime="bench", rows=(8,), shape=(64,))
    oracle = Oracle(case, torch.float32, settings.device)

    def check() -> dict[str, float]:
        verdicts = confirm(oracle.judge(), case.op, case.name)
        return {"torchweld": max(v.error for v in verdicts), "torch": max(v.torch_error for v in verdicts)}

    for grad in (False, True):
        yield Work(
            op="layer_norm",
            direction="forward",
            dtype=torch.float32,
            case={"name": "8 x 64" + (" recording a graph" if grad else ""), "rows": 8, "cols": 64, "grad": grad},
            calls=partial(_calls, oracle.inputs[0], grad),
            check=check,
            repeats=_REPEATS,
            wall=True,
        )
    if not settings.quick:
        yield Work(
            op="import",
            direction="forward",
            dtype=torch.float32,
            case={"name": "fresh process"},
            calls=lambda: {"torchweld": _python("import torch, torchweld"), "torch": _python("import torch")},
            wall=True,
        )
