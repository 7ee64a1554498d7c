"""Builds the CUDA kernels for the CPU with g++, once for each state of their sources."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

_HERE = Path(__file__).parent
_CSRC = _HERE.parent.parent / "csrc"
_SOURCES = [
    _HERE / "module.cpp",
    _HERE / "machine.cpp",
    _CSRC / "cuda/device.cpp",
    *sorted(_CSRC.glob("cuda/*.cu")),
]


def unavailable() -> str | None:
    """Why the kernels cannot be built here; None if they can."""
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return None if shutil.which("g++") else "there is no g++"


def load() -> ModuleType:
    """The module `emulated`, from the cache where its sources have not changed."""
    import pybind11  # noqa: PLC0415  (a build tool: not everyone who runs the tests has it)

    includes = [pybind11.get_include(), sysconfig.get_path("include"), str(_HERE / "include"), str(_CSRC), str(_HERE)]
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-w", '-DTORCHWELD_CUDA_ARCHITECTURES="none"']
    headers = [p for folder in (_HERE, _CSRC) for p in folder.rglob("*.*h")]
    digest = hashlib.sha256(repr((flags, includes)).encode())
    for source in sorted(_SOURCES + headers):
        digest.update(source.read_bytes())

    cache = Path(tempfile.gettempdir()) / f"torchweld-emulated-{os.getuid()}-{digest.hexdigest()[:16]}"
    library = cache / f"emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        with tempfile.TemporaryDirectory() as scratch:

            def compile_one(source: Path) -> str:
                target = f"{scratch}/{source.name}.o"
                command = ["g++", *flags, *(f"-I{i}" for i in includes), "-x", "c++", "-c", str(source), "-o", target]
                subprocess.run(command, check=True)
                return target

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(compile_one, _SOURCES))
            built = f"{scratch}/{library.name}"
            subprocess.run(["g++", "-shared", *objects, "-o", built], check=True)
            cache.mkdir(mode=0o700, exist_ok=True)
            shutil.copy(built, f"{library}.{os.getpid()}")
            os.replace(f"{library}.{os.getpid()}", library)  # another process may be doing the same

    spec = importlib.util.spec_from_file_location("emulated", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
