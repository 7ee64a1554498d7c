"""Builds the CUDA kernels for the CPU with g++: a module of them all, and programs. Objects are kept between runs."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"


class Source(NamedTuple):
    """A file to compile, with the flags of its own."""

    path: Path
    flags: tuple[str, ...] = ()


class Variant(NamedTuple):
    """How to compile .cu files, all files, and to link them."""

    kernels: tuple[str, ...] = ()
    all: tuple[str, ...] = ()
    link: tuple[str, ...] = ()


# Every access of a kernel calls the machine, which defines what ThreadSanitizer's own library would (memory.cpp).
CHECKED = Variant(kernels=("-O1", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"))
# The same, counting the lines that run: gcov reads what write_coverage() leaves.
COUNTED = Variant(
    kernels=(*CHECKED.kernels, "--coverage", "-fprofile-update=single"), link=("--coverage", "-Wl,-u,__gcov_dump")
)
# Global memory and the language itself, by the compiler's own libraries; needs libasan loaded first (sanitized.py). Not
# optimised: it takes longer to compile than to run.
SANITIZED = Variant(
    # GCC 12 judges by an index not yet computed where an element of an array is an operand of a shift; beyond arrays
    # AddressSanitizer sees too.
    kernels=("-O0", "-fsanitize=undefined", "-fno-sanitize=bounds", "-fno-sanitize-recover=all"),
    all=("-fsanitize=address",),
    link=("-fsanitize=address,undefined",),
)

_FLAGS = ("-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-w", '-DTORCHWELD_CUDA_ARCHITECTURES="none"')
MACHINE = [
    Source(HERE / f"{name}.cpp")
    for name in (
        *("async", "barriers", "block", "collectives", "failure", "fiber", "host", "memory", "report", "scheduler"),
        *("shared", "tensor_map", "wgmma"),
    )
]
MACHINE.append(Source(CSRC / "cuda/device.cpp"))
# As in csrc/cuda/CMakeLists.txt.
_HEAD_SIZES = {"float": (64, 128, 256), "__nv_bfloat16": (32, 64, 128, 256), "__half": (32, 64, 128, 256)}
_INSTANCES = [CSRC / f"cuda/attention/{folder}/instance.cu" for folder in ("sm80", "sm90")]
_SM90 = "-DTORCHWELD_SM90"
KERNELS = [
    Source(path, (_SM90,) if path.stem == "attention" else ())
    for path in sorted(CSRC.glob("cuda/**/*.cu"))
    if path not in _INSTANCES
]
KERNELS += [
    Source(path, (f"-DTORCHWELD_DTYPE={dtype}", f"-DTORCHWELD_HEAD_SIZE={size}", _SM90))
    for dtype, sizes in _HEAD_SIZES.items()
    for size in sizes
    for path in _INSTANCES
    if path == _INSTANCES[0] or (dtype != "float" and size >= 64)
]
KERNELS.append(Source(HERE / "products.cu"))


def unavailable() -> str | None:
    """Why the kernels cannot be built here; None if they can."""
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return None if shutil.which("g++") else "there is no g++"


def _cache() -> Path:
    folder = Path(tempfile.gettempdir()) / f"torchweld-emulation-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to somebody else; set TMPDIR")
    return folder


@cache
def _headers() -> bytes:
    digest = hashlib.sha256()
    for path in sorted(p for folder in (HERE, CSRC) for p in folder.rglob("*.*h")):
        digest.update(path.read_bytes())
    return digest.digest()


def _run(command: list[str], **options: Path) -> None:
    # A library that is loaded first to watch this process (sanitized.py) need not watch the compiler.
    subprocess.run(command, check=True, env={n: v for n, v in os.environ.items() if n != "LD_PRELOAD"}, **options)


def _compile(source: Source, variant: Variant, includes: tuple[str, ...]) -> Path:
    flags = [*_FLAGS, *variant.all, *(variant.kernels if source.path.suffix == ".cu" else ("-O2",))]
    command = ["g++", *flags, *source.flags, *(f"-I{i}" for i in includes), "-x", "c++", "-c", str(source.path)]
    digest = hashlib.sha256(repr(command).encode() + _headers() + source.path.read_bytes()).hexdigest()[:20]
    target = _cache() / f"{source.path.stem}-{digest}" / "object.o"
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        scratch = target.with_name(str(os.getpid()))  # another process may be doing the same
        scratch.mkdir(exist_ok=True)
        _run([*command, "-o", "object.o"], cwd=scratch)
        for file in sorted(scratch.iterdir()):  # the object last
            os.replace(file, target.with_name(file.name))
        scratch.rmdir()
    return target


def build(sources: list[Source], variant: Variant = CHECKED, *, module: str | None = None) -> Path:
    """A program of these sources, or the Python module of this name."""
    includes = [str(HERE / "include"), str(CSRC), str(HERE)]
    if module:
        import pybind11  # noqa: PLC0415  (a build tool: not everyone who runs the tests has it)

        includes += [pybind11.get_include(), sysconfig.get_path("include")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda s: str(_compile(s, variant, tuple(includes))), sources))
    digest = hashlib.sha256(repr((objects, variant)).encode()).hexdigest()[:20]
    name = f"{module}{sysconfig.get_config_var('EXT_SUFFIX')}" if module else "program"
    target = _cache() / f"linked-{digest}" / name
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        scratch = target.with_name(f"{name}.{os.getpid()}")
        flags = [*variant.link, *(["-shared"] if module else []), "-o", str(scratch)]
        _run(["g++", *objects, *flags])
        os.replace(scratch, target)
    return target


def program(name: str) -> Path:
    """The program of programs/NAME.cu."""
    return build([*MACHINE, Source(HERE / "programs" / f"{name}.cu")])


@cache
def load(variant: Variant = COUNTED) -> ModuleType:
    """The module of all CUDA kernels, `emulated`."""
    library = build([Source(HERE / "module.cpp", ("-O1",)), *KERNELS, *MACHINE], variant, module="emulated")
    spec = importlib.util.spec_from_file_location("emulated", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
