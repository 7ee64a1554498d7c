"""What holds for every source file: it has one idea, in at most 320 lines, and no way along its imports leads back."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("csrc", "python", "tests", "bench", "examples")
CPP = {".h", ".cpp", ".cu", ".cuh", ".in"}
LIMIT = 320
BEGINNINGS = ("python", "tests", "tests/emulation", "tests/emulation/include", "csrc", "")  # of names and paths


@cache
def sources() -> dict[str, str]:
    """The text of each file by its path from the root."""
    found = (p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.suffix in {".py", ".pyi", *CPP})
    return {str(p.relative_to(ROOT)): p.read_text() for p in sorted(found) if "build" not in p.parts}


def test_a_file_has_one_idea() -> None:
    lengths = {path: len(text.splitlines()) for path, text in sources().items()}
    assert len(lengths) > 500 and {f for f in FOLDERS if any(p.startswith(f"{f}/") for p in lengths)} == {*FOLDERS}
    assert {path: lines for path, lines in lengths.items() if lines > LIMIT} == {}


# ---- Cycles


def cycle(edges: dict[str, set[str]]) -> list[str]:
    """A way along the edges from a node back to it; empty if there is none."""
    done: set[str] = set()

    def walk(node: str, way: list[str]) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node not in done:
            for other in sorted(edges.get(node, ())):
                if found := walk(other, [*way, node]):
                    return found
            done.add(node)
        return []

    return next((found for node in sorted(edges) if (found := walk(node, []))), [])


def file_of(name: str, importer: str) -> str | None:
    """The file that an include or an import names; None for one that is not ours."""
    for beginning in (str(Path(importer).parent), *BEGINNINGS):
        path = f"{beginning}/{name}".removeprefix("/")
        if path in sources():
            return path
    return None


def modules(tree: ast.AST) -> Iterator[str]:
    """What a file imports, also inside of its functions; but not what only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from modules(node)


def module_of(name: str, importer: str) -> str | None:
    """The file of a module, or of the module that a name is taken from."""
    parts = name.split(".")
    for whole in (parts, parts[:-1]):
        path = "/".join(whole)
        for file in (f"{path}.py", f"{path}/__init__.py", f"{path}.pyi"):
            if whole and (found := file_of(file, importer)):
                return found
    return None


def edges() -> dict[str, set[str]]:
    found = {}
    for path, text in sources().items():
        if path.endswith(".py"):
            named = (module_of(name, path) for name in modules(ast.parse(text)))
        else:
            named = (file_of(name, path) for name in re.findall(r'#\s*include\s*"([^"]+)"', text))
        found[path] = {other for other in named if other is not None} - {path}
    return found


def test_no_file_includes_or_imports_itself() -> None:
    ways = edges()
    assert cycle(ways) == []
    # The search finds what is there, and a cycle that is made.
    assert (
        "csrc/params/types.h" in ways["csrc/cpu/simd/vec.h"]
        and "tests/squad.py" in ways["tests/training/test_answer.py"]
    )
    assert cycle({**ways, "csrc/params/types.h": {"csrc/cpu/isa/kernels.h"}})
    assert "python/torchweld/integrations/hugging_face.py" in ways["python/torchweld/patching/drop_ins.py"]
    assert cycle({**ways, "python/torchweld/errors.py": {"python/torchweld/cli/check.py"}})
