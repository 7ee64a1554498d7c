"""What `_cpu.pyi` and `_cuda.pyi` promise is what the bindings have; every op has the signature of its twins."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from torchweld import _cpu, backend, ops, reference
from torchweld.ops import _attention_autograd, _norm_autograd
from torchweld.ops._attention import Modifiers
from torchweld.ops._norm import Norm
from torchweld.ops._records import Layout

ROOT = Path(__file__).resolve().parents[2]
BINDINGS = ROOT / "csrc" / "bindings"
DEF = re.compile(r'\bm\.def\(\s*((?:"[^"]*"\s*)+)')
RECORD = re.compile(r'\bm\.def_record<\w+>\("(\w+)"\)')


def stub(name: str) -> dict[str, list[str] | None]:
    """Names in a stub, each with its parameters; of a constant None."""
    found: dict[str, list[str] | None] = {}
    for node in ast.parse((ROOT / "python" / "torchweld" / f"{name}.pyi").read_text()).body:
        if isinstance(node, ast.FunctionDef):
            args = node.args
            assert not (args.posonlyargs or args.kwonlyargs or args.defaults or args.vararg or args.kwarg), node.name
            assert all(a.annotation is not None for a in args.args) and node.returns is not None, node.name
            found[node.name] = [a.arg for a in args.args]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = None
        elif isinstance(node, ast.ImportFrom) and node.module == "torchweld._cpu":
            shared = stub("_cpu")
            found |= {a.name: shared[a.name] for a in node.names}
    return found


def bindings(name: str) -> str:
    """A module's source and the headers it includes."""
    text = (BINDINGS / f"{name}.cpp").read_text()
    return text + "".join((BINDINGS / h).read_text() for h in re.findall(r'#include "bindings/(\w+\.h)"', text))


def bound(name: str) -> dict[str, list[str]]:
    """Functions that a module's source binds, with their parameters."""
    signatures = ["".join(re.findall(r'"([^"]*)"', first)) for first in DEF.findall(bindings(name))]
    signatures = [s.partition(")")[0] for s in signatures]
    return {n: rest.split(", ") if rest else [] for n, _, rest in (s.partition("(") for s in signatures)}


def functions(names: dict[str, list[str] | None]) -> dict[str, list[str]]:
    return {n: parameters for n, parameters in names.items() if parameters is not None}


@pytest.mark.parametrize(("name", "source"), [("_cpu", "cpu_module"), ("_cuda", "cuda_module")])
def test_a_stub_has_what_the_source_binds(name: str, source: str) -> None:
    promised = stub(name)
    assert functions(promised) == bound(source)
    published = set(RECORD.findall(bindings(source)))
    assert published == {n for n in records() if n in promised}


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


def records() -> dict[str, type[Any]]:
    """The records that `_cpu.pyi` imports from the ops, by name."""
    found: dict[str, type[Any]] = {}
    for node in ast.parse((ROOT / "python" / "torchweld" / "_cpu.pyi").read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("torchweld.ops"):
            found |= {a.name: getattr(importlib.import_module(node.module), a.name) for a in node.names}
    return found


@pytest.mark.parametrize("name", list(backend.kernels))
def test_records_have_the_fields_of_the_module(name: str) -> None:
    published = {n: v for n, v in vars(backend.kernels[name]).items() if isinstance(v, tuple)}
    promised = stub(f"_{name}")
    assert published == {n: record._fields for n, record in records().items() if n in promised}
    assert len(published) > 8


def test_a_schema_lists_the_fields_of_a_record_with_their_types() -> None:
    schema = str(torch.ops.torchweld.layer_norm.default._schema)
    assert "Tensor? bias, SymInt cols, float eps, bool centred, float weight_offset, float dropout_p) ->" in schema
    schema = str(torch.ops.torchweld.sgd_.default._schema)
    assert "sgd_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] momentum_buffers, " in schema
    assert "bool first_step, float lr, Tensor? lr_tensor, " in schema and "int? rounding_seed) -> ()" in schema


def test_arguments_are_packed_into_records_and_listed_again() -> None:
    layout = Layout("op(Tensor x, Norm norm, bool flag=True) -> Tensor", (Norm,))
    norm = Norm(3, 1.0, False, 2.0, 0.5)
    assert (
        layout.schema.startswith("op(Tensor x, SymInt cols, float eps, ")
        and "dropout_p, bool flag=True)" in layout.schema
    )
    for arguments in (("x", norm, False), ("x", norm)):  # what has a default may be left out
        flat = layout.flat(arguments)
        assert flat == ["x", *norm, *arguments[2:]]
        assert layout.packed(flat) == list(arguments)


def test_the_ops_see_the_types_of_all_kernels() -> None:
    source = (ROOT / "python" / "torchweld" / "backend.py").read_text()
    typed = re.findall(r"(\w+) = staticmethod\(_cpu\.\1\)", source)
    found = ("whole_", "node_", "method")  # by backend.whole_call and backend.node
    others = {name for name in functions(stub("_cpu")) if name.startswith(found)}
    assert {*typed, *others, "isa", "use_isa", "built_isas", "available_isas"} == set(functions(stub("_cpu")))


WHOLE = {"scaled_dot_product_attention": "attention"}  # whose whole call has another name
FEW = 4  # parameters that a call may give by position


def test_the_package_calls_kernels_by_name() -> None:
    """No order of arguments is agreed upon by two files."""
    many = {n for n, parameters in functions(stub("_cpu")).items() if len(parameters) > FEW}
    called = set()
    for path in (ROOT / "python" / "torchweld").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.startswith("_whole"):
                assert not node.args, f"{path}:{node.lineno}"
                called.add(f"whole_{WHOLE.get(path.stem, path.stem)}{node.func.id.removeprefix('_whole')}")
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in many:
                owner = ast.unparse(node.func.value)
                if "kernels" in owner or owner == "module":
                    assert not node.args, f"{path}:{node.lineno}"
                    called.add(node.func.attr)
    assert called | {f"node_{name}_forward" for name in DEFINITIONS} >= many


DEFINITIONS = {
    "attention": _attention_autograd._Attention,
    "cross_entropy": sys.modules["torchweld.ops.cross_entropy"]._CrossEntropy,
    "gelu": sys.modules["torchweld.ops.gelu"]._Gelu,
    "layer_norm": _norm_autograd._LayerNorm,
}


def test_nodes_have_the_arguments_of_their_definitions() -> None:
    """torch hands them over by position."""
    nodes = {n: parameters for n, parameters in functions(stub("_cpu")).items() if n.startswith("node_")}
    assert set(nodes) == {f"node_{name}_{direction}" for name in DEFINITIONS for direction in ("forward", "backward")}
    for name, definition in DEFINITIONS.items():
        forward = list(inspect.signature(definition.forward).parameters)
        if forward[-1] == "modifiers":  # of which the node takes the first
            forward[-1] = Modifiers._fields[0]
        assert nodes[f"node_{name}_forward"] == forward
        backward = list(inspect.signature(definition.backward).parameters)
        assert nodes[f"node_{name}_backward"] == [p for p in backward if p != "dlse"]
        gradients = list(inspect.signature(definition.gradients).parameters)
        assert gradients == ["ctx", "saved", *backward[1:]]


def test_types_of_results_are_those_of_the_stub() -> None:
    assert isinstance(_cpu.isa(), str) and isinstance(_cpu.built_isas(), list)
    assert isinstance(_cpu.layer_norm_workspace(8, 8, True, 0), int)
    assert _cpu.use_isa(_cpu.isa()) is None  # type: ignore[func-returns-value]


# ---- Ops

# What a reference or torch does without: deprecated arguments of torch's, work in place, and what torch has no twin of.
OURS = {
    ("cross_entropy", "reference"): {"size_average", "reduce"},
    ("rms_norm", "torch"): {"zero_centered_weight"},
    ("dropout", "torch"): {"seed"},
    ("dropout", "reference"): {"inplace"},
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
