"""What `_cpu.pyi` and `_cuda.pyi` promise is what the bindings have; every op has the signature of its twins."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from torchweld import _cpu, backend, ops, reference
from torchweld.ops import _attention

ROOT = Path(__file__).resolve().parents[2]
BINDINGS = ROOT / "csrc" / "bindings"
DEF = re.compile(r'\bm\.def\(\s*((?:"[^"]*"\s*)+)')


def stub(name: str) -> dict[str, list[str] | None]:
    """Names in a stub, each with its positional parameters; of a constant None."""
    found: dict[str, list[str] | None] = {}
    for node in ast.parse((ROOT / "python" / "torchweld" / f"{name}.pyi").read_text()).body:
        if isinstance(node, ast.FunctionDef):
            args = node.args
            assert not (args.args or args.kwonlyargs or args.defaults or args.vararg or args.kwarg), node.name
            assert all(a.annotation is not None for a in args.posonlyargs) and node.returns is not None, node.name
            found[node.name] = [a.arg for a in args.posonlyargs]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = None
        elif isinstance(node, ast.ImportFrom) and node.module == "torchweld._cpu":
            shared = stub("_cpu")
            found |= {a.name: shared[a.name] for a in node.names}
    return found


def bound(name: str) -> dict[str, list[str]]:
    """Functions that a module's source and the headers it includes bind, with their parameters."""
    text = (BINDINGS / f"{name}.cpp").read_text()
    for header in re.findall(r'#include "bindings/(\w+\.h)"', text):
        text += (BINDINGS / header).read_text()
    signatures = ["".join(re.findall(r'"([^"]*)"', first)) for first in DEF.findall(text)]
    signatures = [s.partition(")")[0] for s in signatures]
    return {n: rest.split(", ") if rest else [] for n, _, rest in (s.partition("(") for s in signatures)}


def functions(names: dict[str, list[str] | None]) -> dict[str, list[str]]:
    return {n: parameters for n, parameters in names.items() if parameters is not None}


@pytest.mark.parametrize(("name", "source"), [("_cpu", "cpu_module"), ("_cuda", "cuda_module")])
def test_a_stub_has_what_the_source_binds(name: str, source: str) -> None:
    assert functions(stub(name)) == bound(source)


@pytest.mark.parametrize("name", list(backend.kernels))
def test_a_stub_has_what_the_module_has(name: str) -> None:
    module = backend.kernels[name]
    public = {n: v for n, v in vars(module).items() if not n.startswith("_")}
    promised = stub(f"_{name}")
    assert set(promised) == set(public)
    for n, value in public.items():
        parameters = promised[n]
        if parameters is None:
            assert isinstance(value, int | tuple)
        else:
            signature = inspect.signature(value)
            assert list(signature.parameters) == parameters, n
            assert all(p.default is p.empty for p in signature.parameters.values()), n


@pytest.mark.parametrize("name", list(backend.kernels))
def test_records_have_the_fields_of_the_module_and_of_the_schemas(name: str) -> None:
    module = backend.kernels[name]
    assert module.Modifiers == _attention.Modifiers._fields
    assert module.Options == _attention.Options._fields
    for op, fields in (("attention", module.Modifiers + module.Options), ("paged_attention", module.PagedOptions)):
        arguments = getattr(torch.ops.torchweld, op).default._schema.arguments
        assert tuple(a.name for a in arguments[-len(fields) :]) == fields


def test_the_ops_see_the_types_of_all_kernels() -> None:
    source = (ROOT / "python" / "torchweld" / "backend.py").read_text()
    typed = re.findall(r"(\w+) = staticmethod\(_cpu\.\1\)", source)
    assert {*typed, "isa", "use_isa", "built_isas", "available_isas"} == set(functions(stub("_cpu")))


def test_types_of_results_are_those_of_the_stub() -> None:
    assert isinstance(_cpu.isa(), str) and isinstance(_cpu.built_isas(), list)
    assert isinstance(_cpu.layer_norm_workspace(8, 8, True, 0), int)
    assert _cpu.use_isa(_cpu.isa()) is None  # type: ignore[func-returns-value]


# ---- Ops

# What a reference or torch does without: deprecated arguments of torch's, and what torch has no twin of.
OURS = {
    ("cross_entropy", "reference"): {"size_average", "reduce"},
    ("rms_norm", "torch"): {"zero_centered_weight"},
}
# torch's function of the name has class weights in the place of the z loss, and another name for the bias: the tensors
# that all calls have stand in the same places, the rest is by name.
POSITIONS = {"linear_cross_entropy": 3}


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Of a function that parses its arguments in C++, as the first lines of its documentation have them."""
    if inspect.isbuiltin(function):
        written = re.match(r"\s*\w+\((.*?)\)\s*->", function.__doc__ or "", re.DOTALL)
        assert written is not None
        function = eval(f"(lambda {written[1]}: None)")
    return dict(inspect.signature(function).parameters)


def compare(name: str, kind: str, theirs: Callable[..., Any]) -> None:
    extra = OURS.get((name, kind), set())
    ours = {n: p for n, p in parameters(getattr(ops, name)).items() if n not in extra}
    expected = parameters(theirs)
    assert [(n, p.kind, p.default) for n, p in ours.items()] == [(n, p.kind, p.default) for n, p in expected.items()]


@pytest.mark.parametrize("name", ops.__all__)
def test_an_op_has_the_signature_of_its_reference(name: str) -> None:
    compare(name, "reference", getattr(reference, name))


@pytest.mark.parametrize("name", [n for n in ops.__all__ if hasattr(torch.nn.functional, n)])
def test_an_op_has_the_signature_of_torch(name: str) -> None:
    theirs = getattr(torch.nn.functional, name)
    if name in POSITIONS:
        ours, expected = (list(parameters(f).values()) for f in (getattr(ops, name), theirs))
        count = POSITIONS[name]
        assert [(p.kind, p.default) for p in ours[:count]] == [(p.kind, p.default) for p in expected[:count]]
        assert all(p.kind is p.KEYWORD_ONLY for p in expected[count:])
    else:
        compare(name, "torch", theirs)
