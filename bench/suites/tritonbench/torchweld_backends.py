"""torchweld as a backend of TritonBench's operators, and Adam as an operator of its own.

    python bench/suites/tritonbench/torchweld_backends.py --checkout DIR --op layer_norm --device cpu --mode fwd_bwd

All options but --checkout are those of TritonBench's run.py, which is run after the backends are registered.
"""

from __future__ import annotations

import argparse
import importlib.util
import runpy
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torchweld
from torchweld import ops

Call = Callable[[], Any]
NAME = "torchweld"


def layer_norm(self: Any, *args: Any) -> Call:
    return lambda: ops.layer_norm(*args)


def rms_norm(self: Any, H: int, input: Any) -> Call:
    norm = torchweld.nn.RMSNorm(H, eps=self.eps).to(self.device)
    return lambda: norm(input)


def cross_entropy(self: Any, input: Any, target: Any) -> Call:
    return lambda: ops.cross_entropy(input, target)


def fused_linear_cross_entropy(self: Any, input: Any, weight: Any, target: Any) -> Call:
    return lambda: ops.linear_cross_entropy(input, weight, target)


def swiglu(self: Any, input: Any) -> Call:
    model = deepcopy(self.baseline_op)
    torchweld.patch(model)
    return lambda: model(input)


def rope(self: Any, hidden_size: int, seq_length: int) -> Call:
    q, k, cos, sin, _ = self.prepare_input(hidden_size, seq_length)
    return lambda: ops.rotary_embedding(q, k, cos, sin)


def flash_attention(self: Any, q: Any, k: Any, v: Any) -> Call:
    return lambda: ops.scaled_dot_product_attention(q, k, v, is_causal=self.causal, scale=self.sm_scale)


BACKENDS: dict[str, Callable[..., Call]] = {
    f.__name__: f
    for f in (layer_norm, rms_norm, cross_entropy, fused_linear_cross_entropy, swiglu, rope, flash_attention)
}


def register(operators: Sequence[str] = (*BACKENDS, "adam")) -> None:
    """Adds the backend `torchweld` to these operators of the TritonBench that can be imported."""
    from tritonbench.operators import load_opbench_by_name  # noqa: PLC0415  (a checkout)
    from tritonbench.utils.triton_op import register_benchmark  # noqa: PLC0415

    for name in operators:
        if name == "adam":
            _load_adam()
        elif name in BACKENDS:
            operator = load_opbench_by_name(name)
            setattr(operator, NAME, register_benchmark(operator_name=name, func_name=NAME)(BACKENDS[name]))


def _load_adam() -> Any:
    """The module of the operator, under the name by which TritonBench looks for it."""
    name = "tritonbench.operators.adam"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("adam.py"))
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    from tritonbench.operators import op  # noqa: PLC0415

    known = op._list_opbench_paths  # the folders that have operators
    if not hasattr(known, "with_adam"):
        listed: Any = lambda: [*known(), "adam"]  # noqa: E731
        listed.with_adam = True
        op._list_opbench_paths = listed
    return sys.modules[name]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, add_help=False, allow_abbrev=False)
    parser.add_argument("--checkout", type=Path, required=True)
    parser.add_argument("--op", default=",".join((*BACKENDS, "adam")))
    args, rest = parser.parse_known_args(argv)
    sys.path.insert(0, str(args.checkout))
    register(args.op.split(","))
    sys.argv = ["run.py", "--op", args.op, *rest]
    runpy.run_path(str(args.checkout / "run.py"), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
