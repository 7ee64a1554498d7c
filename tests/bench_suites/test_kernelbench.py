"""Solutions of KernelBench's problems, held to the problems as the suite holds them: five random inputs, and seeds."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from torchweld import backend

SUITE = Path(__file__).resolve().parents[2] / "bench" / "suites" / "kernelbench"
SOLUTIONS = sorted(path.relative_to(SUITE).as_posix() for path in SUITE.glob("level*/*.py"))
# Sizes for a CPU, in place of those of the problems.
SMALL = {
    **{"batch_size": 3, "dim": 67, "features": 4, "dim1": 5, "dim2": 7, "num_classes": 31, "input_shape": (31,)},
    **{"input_size": 24, "output_size": 40, "in_features": 24, "out_features": 40},
    **{"sequence_length": 19, "embedding_dimension": 1024},
    **{"max_seqlen": 40, "seq_len": 33, "n_embd": 48, "n_head": 3},
    **{"embed_dim": 32, "num_channels": 32, "image_height": 6, "image_width": 5, "num_heads": 4},
    **{"depth": 2, "mlp_dim": 64, "heads": 4, "image_size": 32, "dim": 64},
}
BY_PATCH = {
    "level3/28_VisionTransformer.py": "TransformerEncoderLayer",
    "level3/31_VisionAttention.py": "MultiheadAttention",
}
TOLERANCE = 1e-4  # eval.py, get_tolerance_for_precision, float32


def small(source: str) -> str:
    """The problem with other sizes: those that it assigns on lines of their own."""
    for name, value in SMALL.items():
        source = re.sub(rf"^{name} = .*$", f"{name} = {value}", source, flags=re.MULTILINE)
    return source


def agree(problem: dict[str, Any], new: type[torch.nn.Module], seed: int = 42) -> None:
    models = []
    for cls in (problem["Model"], new):
        torch.manual_seed(seed)  # parameters come from the seed, so both must draw them in the same order
        models.append(cls(*problem["get_init_inputs"]()).eval())
    for trial in range(5):
        torch.manual_seed(seed + trial)
        inputs = problem["get_inputs"]()
        with torch.no_grad():
            wanted, found = (model(*(x.clone() for x in inputs)) for model in models)
        assert found.shape == wanted.shape
        torch.testing.assert_close(found, wanted, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", SOLUTIONS)
def test_a_solution_agrees_with_its_problem(name: str, checkout: Callable[[str], Path]) -> None:
    problem: dict[str, Any] = {}
    exec(small((checkout("KernelBench") / "KernelBench" / name).read_text()), problem)
    with backend.strict():  # the kernels serve it
        agree(problem, runpy.run_path(str(SUITE / name))["ModelNew"])


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")  # the problem's own layers, of torch
@pytest.mark.parametrize("name", BY_PATCH)
def test_a_patched_problem_agrees_with_itself(name: str, checkout: Callable[[str], Path]) -> None:
    problem: dict[str, Any] = {}
    patched = runpy.run_path(str(SUITE / "patched.py"))["solution"]
    exec(patched(small((checkout("KernelBench") / "KernelBench" / name).read_text())), problem)
    agree(problem, problem["ModelNew"])
    layers = problem["ModelNew"](*problem["get_init_inputs"]()).modules()
    swapped = {type(layer).__module__ for layer in layers if BY_PATCH[name] in type(layer).__name__}
    assert len(swapped) == 1 and swapped.pop().startswith("torchweld")


def test_the_names_are_those_of_the_problems(checkout: Callable[[str], Path]) -> None:
    assert SOLUTIONS and all((checkout("KernelBench") / "KernelBench" / name).exists() for name in SOLUTIONS)


@pytest.mark.parametrize("name", SOLUTIONS)
def test_a_solution_can_be_loaded_alone(name: str) -> None:
    assert issubclass(runpy.run_path(str(SUITE / name))["ModelNew"], torch.nn.Module)
