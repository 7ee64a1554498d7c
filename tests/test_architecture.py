"""Data flows one way: nn -> ops -> backend -> bindings -> {cpu, cuda}; reference and csrc know nothing above them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "torchweld"
CSRC = ROOT / "csrc"

# What the files of each part of the package may import from torchweld.
ALLOWED = {
    "reference": {"reference"},
    "backend": set(),
    "errors": set(),
    "ops": {"ops", "backend", "reference"},
    "nn": {"nn", "ops"},
    "hugging_face": {"ops"},
    "flash_attention_impl": {"ops", "backend", "reference"},
    "patching": {"patching", "nn", "ops", "hugging_face", "backend"},
    "optim": {"optim", "ops", "backend"},
}
# What the files of each folder of csrc may include besides the system's headers.
INCLUDES = {
    "bindings": {"bindings", "cpu", "cuda", "params.h", "philox.h"},
    "cpu": {"cpu", "params.h", "philox.h", "moments.h"},
    "cuda": {"cuda", "params.h", "philox.h", "moments.h"},
}


def imported(path: Path) -> set[str]:
    """Parts of torchweld that a module imports: {"ops", "backend", ...}."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("torchweld.")}
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "torchweld":
                found |= {a.name for a in node.names}
            elif node.module.startswith("torchweld."):
                found.add(node.module.split(".")[1])
    return found


@pytest.mark.parametrize("part", ALLOWED)
def test_python_imports_flow_one_way(part: str) -> None:
    files = sorted((PACKAGE / part).glob("**/*.py")) or [PACKAGE / f"{part}.py"]
    assert files
    for path in files:
        assert imported(path) <= ALLOWED[part], path


@pytest.mark.parametrize("folder", INCLUDES)
def test_cpp_includes_flow_one_way(folder: str) -> None:
    files = [p for p in (CSRC / folder).iterdir() if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert files
    for path in files:
        text = path.read_text()
        assert not re.search(r'#\s*include\s*[<"](torch|ATen|c10)/', text), path
        for name in re.findall(r'#\s*include\s*"([^"]+)"', text):
            assert name.split("/")[0] in INCLUDES[folder], f"{path} includes {name}"
        if folder != "bindings":
            assert "pybind11" not in text and "Python.h" not in text, path


def test_every_op_has_a_reference_of_its_name() -> None:
    from torchweld import ops, reference  # noqa: PLC0415

    assert set(ops.__all__) <= set(reference.__all__)
