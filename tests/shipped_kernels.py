"""The CUDA kernels that are installed, as cubins, with readable names; and the mark of tests that need them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import machine_code
from machine_code import Kernel, Resources

REASON = (
    "torchweld._cuda is not built"
    if machine_code.library() is None
    else None
    if machine_code.tool("nvdisasm") and machine_code.tool("cuobjdump")
    else "there is no nvdisasm or no cuobjdump: pip install nvidia-cuda-nvdisasm nvidia-cuda-cuobjdump"
)
needs_machine_code = [
    pytest.mark.slow,
    pytest.mark.skipif(REASON is not None, reason=REASON or ""),
    pytest.mark.xdist_group("machine_code"),
]


class Cubin(NamedTuple):
    path: Path
    architecture: str
    kernels: dict[str, tuple[str, Resources]]  # by mangled name: the readable one


def short(kernel: str) -> str:
    """A demangled name without its namespaces above the family."""
    name = kernel.removeprefix("void ").replace("(anonymous namespace)::", "").replace("torchweld::cuda::", "")
    return name.removeprefix("attention::")


def demangled(names: list[str]) -> list[str]:
    found = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return found.stdout.split("\n")


def extract(library: Path, folder: Path) -> list[Cubin]:
    found = []
    for path, architecture in machine_code.cubins(library, folder).items():
        resources = machine_code.resources(path)
        readable = demangled(list(resources))
        kernels = {name: (readable[i], each) for i, (name, each) in enumerate(resources.items())}
        found.append(Cubin(path, architecture, kernels))
    return found


def chosen(cubins: list[Cubin], pattern: str) -> Iterator[tuple[str, str, Kernel]]:
    """Architecture, short name and code of each kernel whose short name begins so."""
    for cubin in cubins:
        names = {mangled: short(readable) for mangled, (readable, _) in cubin.kernels.items()}
        wanted = {mangled for mangled, name in names.items() if re.match(pattern, name)}
        for kernel in machine_code.disassemble(cubin.path) if wanted else ():
            if kernel.name in wanted:
                yield cubin.architecture, names[kernel.name], kernel
