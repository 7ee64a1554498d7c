"""Data flows one way: nn -> ops -> backend -> bindings -> {cpu, cuda}; reference and csrc know nothing above them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import torchweld

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python" / "torchweld"
CSRC = ROOT / "csrc"

# What the files of each part of the package may import from torchweld. All but the reference may import _torch.
ALLOWED = {
    "_torch": set(),
    "reference": {"reference"},
    "backend": {"_cpu"},
    "errors": set(),
    "console": set(),
    "files": {"errors"},
    "pages": {"pages", "files"},
    "environment": {"backend"},
    "memory": set(),
    "ops": {"ops", "backend", "reference"},
    "nn": {"nn", "ops"},
    "integrations": {"integrations", "nn", "ops", "backend", "reference"},
    "patching": {"patching", "nn", "ops", "integrations", "backend"},
    "optim": {"optim", "ops", "backend"},
    "distributed": {"distributed", "ops", "backend", "reference"},
    "models": {"models", "nn", "ops", "optim", "errors"},
    "testing": {"testing", "ops", "nn", "optim", "reference", "backend", "_cpu", "console"},
    "training": {"training", "models", "nn", "ops", "optim", "distributed", "backend", "errors", "console"}
    | {"environment", "memory", "files", "pages"},
    "bench": {"bench", "testing", "patching", "models", "nn", "optim", "ops", "reference", "backend"}
    | {"errors", "console", "environment", "memory", "files", "pages"},
    "cli": {"cli", "testing", "ops", "backend", "errors", "console", "environment"},
}
# What the files of each folder of csrc may include besides their own folder and the system's headers.
SIMD = {"params", "philox.h"}
KERNELS = SIMD | {"cpu/isa", "cpu/simd", "cpu/parallel.h"}
DEVICE = {"params", "philox.h", "cuda"}
INCLUDES = {
    "": {"philox.h"},
    "params": {"philox.h"},
    "bindings": {"params", "philox.h", "cpu/isa", "cuda"},
    "cpu": set(),
    "cpu/isa": {"params"},
    "cpu/simd": SIMD,
    "cpu/matmul": {"cpu/simd"},
    "cpu/attention": KERNELS | {"cpu/matmul"},
    "cpu/norm": KERNELS | {"moments.h"},
    "cpu/activation": KERNELS,
    "cpu/loss": KERNELS | {"cpu/matmul"},
    "cpu/optimizer": KERNELS,
    "cpu/rotary": KERNELS,
    "cuda": {"params", "philox.h"},
    "cuda/attention": DEVICE,
    "cuda/attention/sm80": DEVICE | {"cuda/attention"},
    "cuda/attention/sm90": DEVICE | {"cuda/attention"},
    "cuda/norm": DEVICE | {"moments.h"},
    "cuda/activation": DEVICE,
    "cuda/loss": DEVICE,
    "cuda/optimizer": DEVICE,
    "cuda/rotary": DEVICE,
}
SUFFIXES = (".h", ".cpp", ".cu", ".cuh")


def imported(path: Path) -> set[str]:
    """Parts of torchweld that a module imports: {"ops", "backend", ...}."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("torchweld.")}
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "torchweld":
                found |= {a.name for a in node.names} - {"__version__"}
            elif node.module.startswith("torchweld."):
                found.add(node.module.split(".")[1])
    return found


@pytest.mark.parametrize("part", ALLOWED)
def test_python_imports_flow_one_way(part: str) -> None:
    files = sorted((PACKAGE / part).glob("**/*.py")) or [PACKAGE / f"{part}.py"]
    assert files
    for path in files:
        assert imported(path) <= ALLOWED[part] | ({"_torch"} if part != "reference" else set()), path


def sources(folder: str) -> list[Path]:
    return sorted(p for p in (CSRC / folder).glob("*") if p.suffix in SUFFIXES)


def included(path: Path) -> list[str]:
    return re.findall(r'#\s*include\s*"([^"]+)"', path.read_text())


@pytest.mark.parametrize("folder", INCLUDES)
def test_cpp_includes_flow_one_way(folder: str) -> None:
    for path in sources(folder):
        text = path.read_text()
        assert not re.search(r'#\s*include\s*[<"](torch|ATen|c10)/', text), path
        for name in included(path):
            assert {name, str(Path(name).parent)} & (INCLUDES[folder] | {folder}), f"{path} includes {name}"
        if folder != "bindings":
            assert "pybind11" not in text and "Python.h" not in text, path


def test_every_folder_of_csrc_has_its_rule() -> None:
    folders = {str(p.parent.relative_to(CSRC)) for p in CSRC.rglob("*") if p.suffix in SUFFIXES}
    assert {"" if f == "." else f for f in folders} <= INCLUDES.keys()


def test_the_bindings_import_nothing_above_them() -> None:
    """What they need of the package is handed to them."""
    imported = {
        name
        for path in (CSRC / "bindings").iterdir()
        for name in re.findall(r"module_::import\(\"([^\"]+)\"\)", path.read_text())
    }
    assert "torch" in imported
    assert {name for name in imported if name.split(".")[0] == "torchweld"} <= {"torchweld._cpu"}


def test_every_op_has_a_reference_of_its_name() -> None:
    assert set(torchweld.ops.__all__) <= set(torchweld.reference.__all__)


# ---- Names

# Private names of Python and of transformers, for which torch is not to blame; named tuples have the first three.
NOT_OF_TORCH = {"_asdict", "_fields", "_replace", "_exit", "_getframe", "_SubParsersAction"}
NOT_OF_TORCH |= {
    "_attn_implementation",
    "_can_set_attn_implementation",
    "_supports_sdpa",
    "_supports_attention_backend",
    "_experts_implementation",
    "_default_apply_gate",
}


def is_private(name: object) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__")


def defined(tree: ast.AST) -> Iterator[str]:
    """The private names that a file gives to something of its own."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                yield name
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                yield name


def foreign_names(tree: ast.AST, own: set[str]) -> Iterator[str]:
    """The private names that a file uses and that the package, which defines `own`, has from elsewhere."""
    for node in ast.walk(tree):
        names: list[str] = []
        match node:
            case ast.Attribute(attr=name):
                names = [name]
            case ast.Call(func=ast.Name(id="getattr" | "hasattr" | "setattr"), args=[_, ast.Constant(str(name)), *_]):
                names = [name]
            case ast.ImportFrom(module=str(module)) if not module.startswith("torchweld"):
                names = [*module.split("."), *(alias.name for alias in node.names)]
            case ast.Import():
                names = [part for alias in node.names for part in alias.name.split(".")]
        yield from (name for name in names if is_private(name) and name not in own | NOT_OF_TORCH)


def test_private_names_of_torch_are_in_one_file() -> None:
    trees = {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
    one = trees.pop(PACKAGE / "_torch.py")
    own = {name for tree in trees.values() for name in defined(tree)} | {"_torch", "_cpu", "_cuda"}
    for path, tree in trees.items():
        assert list(foreign_names(tree, own)) == [], path
    assert {"_C", "_schema", "_has_any_global_hook"} <= set(foreign_names(one, own))  # the search finds them


@pytest.mark.parametrize("module", [torchweld, torchweld.ops, torchweld.nn, torchweld.optim], ids=lambda m: m.__name__)
def test_a_module_shows_what_a_user_may_use(module: ModuleType) -> None:
    assert {*dir(module)} - {"__version__"} == {*module.__all__}
    assert all(hasattr(module, name) for name in dir(module))
