"""How csrc/cuda is laid out: a namespace a folder, a type a namespace, barriers with names."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest

CUDA = Path(__file__).resolve().parents[2] / "csrc/cuda"
SOURCES = sorted(p for p in CUDA.rglob("*") if p.suffix in (".cu", ".cuh", ".h", ".cpp"))
DEVICE = [p for p in SOURCES if p.suffix in (".cu", ".cuh")]
LAUNCHERS = "torchweld::cuda"  # kernels.h declares the launchers here, whatever folder defines them


def namespace_of(path: Path) -> str:
    folder = "::".join(path.parent.relative_to(CUDA).parts)
    return f"{LAUNCHERS}::{folder}" if folder else LAUNCHERS


def name(path: Path) -> str:
    return str(path.relative_to(CUDA))


def types(path: Path) -> set[tuple[str, str]]:
    """Namespace and name of every type that a file defines outside of anonymous namespaces and other types."""
    found: set[tuple[str, str]] = set()
    inside: list[str] = []
    for line in path.read_text().splitlines():
        if opened := re.match(r"namespace ([\w:]*) ?\{", line):
            inside.append(opened[1])
        elif line.startswith("}  // namespace"):
            inside.pop()
        elif "" not in inside and (kind := re.match(r"(?:struct|class|enum class) (\w+)[^;(]*\{", line)):
            found.add(("::".join(inside), kind[1]))
    return found


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parent != CUDA], ids=name)
def test_a_folder_has_one_namespace(path: Path) -> None:
    opened = set(re.findall(r"^namespace ([\w:]+) \{", path.read_text(), re.MULTILINE))
    # instances.h declares what the two families define.
    families = {"sm80", "sm90"} if path.name == "instances.h" else set()
    assert opened - families <= {namespace_of(path), LAUNCHERS}
    if path.suffix != ".cu":
        assert namespace_of(path) in opened and LAUNCHERS not in opened


def test_a_type_has_one_definition() -> None:
    """Two types of one name in one namespace are undefined behaviour, even in two files that never meet."""
    found = defaultdict(set)
    for path in SOURCES:
        for key in types(path):
            found[key].add(name(path))
    assert {key: files for key, files in found.items() if len(files) > 1} == {}
    assert ("torchweld::cuda::attention", "Head") in found  # the search finds types


@pytest.mark.parametrize("path", [p for p in DEVICE if p.name != "ptx_sm90.cuh"], ids=name)
def test_named_barriers_have_names(path: Path) -> None:
    assert re.findall(r"barrier_(?:sync|arrive)\(\s*\d", path.read_text()) == []


def test_the_families_of_kernels_do_not_include_each_other() -> None:
    for path in DEVICE:
        other = {"sm80": "sm90", "sm90": "sm80"}.get(path.parent.name)
        assert other is None or f"cuda/attention/{other}/" not in path.read_text(), path
