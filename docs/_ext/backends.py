"""The directive `backends`: which backend serves which dtypes of an op, found by calls of it under `backend.strict`."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from torchweld import backend, testing

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Where an op of the case lists has another name than its entry in the compiled modules.
ENTRIES = {
    **dict.fromkeys(("layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm"), "layer_norm_forward"),
    **dict.fromkeys(("swiglu", "geglu"), "gated_forward"),
    **{"attention": "attention_forward", "gelu": "gelu_forward", "cross_entropy": "cross_entropy_forward"},
    **{"adamw": "adamw_", "sgd": "sgd_"},
}

# Ops without a CUDA kernel of their own.
BETWEEN_PRODUCTS = {
    "linear_cross_entropy": "those of cross_entropy, in the place of a chunk's logits, between PyTorch's products; "
    "with softcap or z_loss PyTorch's operators"
}


@cache
def served(op: str) -> dict[str, str | None]:
    """For each dtype why the CPU kernels do not serve the op's first case; None if they do."""
    case = testing.ops()[op][0]
    found: dict[str, str | None] = {}
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        try:
            with backend.strict():
                case.ours(case.inputs(dtype))
            found[name] = None
        except backend.NotServedError as error:
            found[name] = error.reason
    return found


@cache
def _in_cuda() -> str:
    return (ROOT / "python/torchweld/_cuda.pyi").read_text()


def table(op: str) -> str:
    """The table as Markdown."""
    on_cpu = served(op)
    kernels = ", ".join(name for name, reason in on_cpu.items() if reason is None)
    rest = "; ".join(f"{name} on a CPU: {reason}" for name, reason in on_cpu.items() if reason is not None)
    cuda = BETWEEN_PRODUCTS.get(op, "none: PyTorch's operators on the GPU")
    if f"as {ENTRIES.get(op, op)}\n" in _in_cuda():
        cuda = f"{kernels}; compiled for sm_80 and sm_90a and tested on an emulated machine, not yet run on a GPU"
    rows = [
        ("CPU kernels", kernels),
        ("CUDA kernels", cuda),
        ("definition", f"every other call, on any device ({rest})" if rest else "every other call, on any device"),
    ]
    return "\n".join(["| backend | takes |", "| --- | --- |", *(f"| {name} | {takes} |" for name, takes in rows)])


class Backends(SphinxDirective):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes(table(self.arguments[0]))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("backends", Backends)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
