"""The backend `torchweld` of TritonBench's operators, run on the CPU by the suite's own code."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

SUITE = Path(__file__).resolve().parents[2] / "bench" / "suites" / "tritonbench"
BACKENDS = runpy.run_path(str(SUITE / "torchweld_backends.py"))

OPTIONS = {
    "layer_norm": ("torch_layer_norm", []),
    "rms_norm": ("llama_rms", []),
    "cross_entropy": ("cross_entropy_loss", ["--B", "1", "--T", "64"]),
    "fused_linear_cross_entropy": ("torch_lm_head_ce", ["--hidden-size", "32", "--vocab-size", "500"]),
    "flash_attention": ("sdpa", ["--batch", "1", "--n-heads", "2", "--causal", "--native-sdpa"]),
    "adam": ("torch_adamw", []),
}
NEEDS_LIGER = ("cross_entropy", "fused_linear_cross_entropy")


@pytest.mark.slow
@pytest.mark.xdist_group("tritonbench")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("operator", OPTIONS)
def test_the_suite_runs_it_and_finds_it_accurate(
    operator: str, checkout: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkout("tritonbench")
    for package in ("triton", "tabulate", "psutil"):
        pytest.importorskip(package, reason=f"{package}, which TritonBench imports, is not installed")
    if operator in NEEDS_LIGER:
        pytest.importorskip("liger_kernel", reason="the operator itself imports liger_kernel")
    monkeypatch.syspath_prepend(str(path))
    BACKENDS["register"]([operator])
    operators = sys.modules["tritonbench.operators"]
    parser = sys.modules.get("tritonbench.utils.parser") or __import__("tritonbench.utils.parser", fromlist=["parser"])
    baseline, own = OPTIONS[operator]
    metrics = "latency" if operator == "adam" else "latency,accuracy"
    words = ["--op", operator, "--device", "cpu", "--num-inputs", "1", "--precision", "fp32", "--metrics", metrics]
    words += ["--only", f"{baseline},torchweld", "--baseline", baseline]
    args, rest = parser.get_parser().parse_known_args([*words, *own])
    bench: Any = operators.load_opbench_by_name(operator)(tb_args=args, extra_args=rest)
    bench.run(1, 1)
    ((_, found),) = bench.output.result
    assert set(found) == {baseline, "torchweld"} and found["torchweld"].latency.p50 > 0
    assert operator == "adam" or found["torchweld"].accuracy


def test_rope_turns_as_transformers_does() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama", reason="transformers is not installed")
    q, k = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16)
    angles = torch.randn(1, 9, 16)
    cos, sin = angles.cos(), angles.sin()
    operator = SimpleNamespace(prepare_input=lambda *_: (q, k, cos, sin, None))
    turned = llama.apply_rotary_pos_emb(q, k, cos, sin)
    for found, wanted in zip(BACKENDS["rope"](operator, 64, 9)(), turned, strict=True):
        torch.testing.assert_close(found, wanted)


def test_swiglu_swaps_a_copy_of_the_baseline() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama", reason="transformers is not installed")
    config = llama.LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2)
    operator, x = SimpleNamespace(baseline_op=llama.LlamaMLP(config)), torch.randn(3, 5, 16)
    torch.testing.assert_close(BACKENDS["swiglu"](operator, x)(), operator.baseline_op(x))
    assert type(operator.baseline_op) is llama.LlamaMLP


def test_losses_are_those_of_torch() -> None:
    x, weight, target = torch.randn(7, 8), torch.randn(11, 8), torch.randint(11, (7,))
    logits = F.linear(x, weight)
    torch.testing.assert_close(BACKENDS["cross_entropy"](None, logits, target)(), F.cross_entropy(logits, target))
    found = BACKENDS["fused_linear_cross_entropy"](None, x, weight, target)()
    torch.testing.assert_close(found, F.cross_entropy(logits, target))
