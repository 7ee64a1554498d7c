"""Builds the CUDA kernels for the CPU with g++: a module of all kernels, and programs. Objects are cached."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"


class Source(NamedTuple):
    """A file to compile, with its own flags."""

    path: Path
    flags: tuple[str, ...] = ()


class Variant(NamedTuple):
    """Extra flags: for .cu files, for all files but the bindings, for the linker."""

    kernels: tuple[str, ...] = ()
    all: tuple[str, ...] = ()
    link: tuple[str, ...] = ()


_TSAN = ("--param", "tsan-instrument-func-entry-exit=0", "--param", "tsan-distinguish-volatile=1")
# Every access of a kernel calls the machine, which replaces ThreadSanitizer's library (memory.cpp).
CHECKED = Variant(kernels=("-O1", "-fsanitize=thread", *_TSAN))
# The same, and counts the lines that run: gcov reads what write_coverage() writes.
COUNTED = Variant(
    kernels=(*CHECKED.kernels, "--coverage", "-fprofile-update=single"), link=("--coverage", "-Wl,-u,__gcov_dump")
)
# Checks global memory and undefined behaviour with the compiler's sanitizers. libasan must be loaded first
# (sanitized.py). Not optimised: compiling takes longer than running.
SANITIZED = Variant(
    # GCC 12 checks the wrong index where an array element is an operand of a shift. AddressSanitizer checks bounds too.
    kernels=("-O0", "-fsanitize=undefined", "-fno-sanitize=bounds", "-fno-sanitize-recover=all"),
    all=("-fsanitize=address",),
    link=("-fsanitize=address,undefined",),
)

# nvcc contracts a product and a sum into one instruction that rounds once, where it likes. Without these g++ does not.
CONTRACTING = ("-mfma", "-ffp-contract=fast", "-fexpensive-optimizations")

_FLAGS = ("-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-w", '-DTORCHWELD_CUDA_ARCHITECTURES="none"')
_INCLUDES = (HERE / "include", CSRC, HERE)
_PARTS = (
    "approximate async barriers block clock collectives descriptor failure fences fiber global host memory "
    "register_pool registers report scheduler shared tensor_map wgmma"
)
MACHINE = [Source(HERE / f"{name}.cpp") for name in _PARTS.split()]
MACHINE.append(Source(CSRC / "cuda/device.cpp"))
# As in csrc/cuda/CMakeLists.txt.
HEAD_SIZES = {"float": (64, 128, 256), "__nv_bfloat16": (32, 64, 128, 256), "__half": (32, 64, 128, 256)}
_SM90 = "-DTORCHWELD_SM90"
BINDINGS = Source(HERE / "module.cpp", ("-O1",))  # they take the longest, and one object serves every module


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


def instance(family: int, dtype: str, size: int) -> Source:
    """The attention kernels of one family (80 or 90), element type and padded head size."""
    text = (CSRC / "cuda/attention/instance.cu.in").read_text()
    for word, value in {"@family@": family, "@dtype@": dtype, "@size@": size}.items():
        text = text.replace(word, str(value))
    folder = _cache() / f"instance-{hashlib.sha256(text.encode()).hexdigest()[:20]}"
    folder.mkdir(exist_ok=True)
    path = folder / f"attention_sm{family}_{dtype}_{size}.cu"
    scratch = path.with_suffix(f".{os.getpid()}")  # another process may be doing the same
    scratch.write_text(text)
    os.replace(scratch, path)
    return Source(path, (_SM90,))


def contracts() -> bool:
    """Whether this processor has the instruction that CONTRACTING asks for."""
    info = Path("/proc/cpuinfo")
    return info.exists() and re.search(r"^flags\b.*\bfma\b", info.read_text(), re.MULTILINE) is not None


class Contracted(NamedTuple):
    """Which kernels have products and sums contracted. Those of attention take longest to compile."""

    attention: bool = False
    others: bool = False


AS_WRITTEN = Contracted()


def kernels(contracted: Contracted = AS_WRITTEN) -> list[Source]:
    """All sources of csrc/cuda, and the kernel of products.cu."""
    paths = [*sorted(CSRC.glob("cuda/**/*.cu")), HERE / "products.cu"]
    flags = CONTRACTING if contracted.others else ()
    sources = [Source(path, (_SM90,) if path.stem == "attention" else flags) for path in paths]
    for dtype, sizes in HEAD_SIZES.items():
        instances = [instance(80, dtype, size) for size in sizes]
        instances += [instance(90, dtype, size) for size in sizes if dtype != "float" and size >= 64]
        more = CONTRACTING if contracted.attention else ()
        sources += [each._replace(flags=(*each.flags, *more)) for each in instances]
    return sources


@cache
def _headers(source: Path) -> bytes:
    """What a source includes of the project's headers, directly or not."""
    found: dict[Path, bytes] = {}
    work = [source]
    while work:
        path = work.pop()
        for name in re.findall(rb'^ *# *include [<"]([^>"]+)', path.read_bytes(), re.MULTILINE):
            folders = (path.parent, *_INCLUDES)
            header = next((p for folder in folders if (p := folder / name.decode()).is_file()), None)
            if header is not None and header not in found:
                found[header] = header.read_bytes()
                work.append(header)
    return b"".join(found[path] for path in sorted(found))


def _run(command: list[str], cwd: Path | None = None) -> None:
    # The sanitizer library that is preloaded into this process (sanitized.py) must not slow the compiler.
    subprocess.run(command, check=True, env={n: v for n, v in os.environ.items() if n != "LD_PRELOAD"}, cwd=cwd)


@contextmanager
def _missing(target: Path) -> Iterator[bool]:
    """Whether a file is still to be made. Inside the block no other process makes it."""
    target.parent.mkdir(exist_ok=True)
    with target.with_name("lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not target.exists()


def _compile(source: Source, variant: Variant) -> Path:
    if variant in (COUNTED, SANITIZED) and "__half" in source.path.stem:
        variant = CHECKED  # its lines are those of bfloat16, which are counted and sanitized
    flags = [*_FLAGS, *(variant.kernels if source.path.suffix == ".cu" else ("-O2",))]
    includes = [*_INCLUDES]
    if source == BINDINGS:
        import pybind11  # noqa: PLC0415  (a build tool: not everyone who runs the tests has it)

        includes += [Path(pybind11.get_include()), Path(sysconfig.get_path("include"))]
    else:
        flags += variant.all
    command = ["g++", *flags, *source.flags, *(f"-I{i}" for i in includes), "-x", "c++", "-c", str(source.path)]
    digest = hashlib.sha256(repr(command).encode() + _headers(source.path) + source.path.read_bytes()).hexdigest()[:20]
    target = _cache() / f"{source.path.stem}-{digest}" / "object.o"
    with _missing(target) as missing:
        if missing:
            scratch = target.with_name("unfinished")
            scratch.mkdir(exist_ok=True)
            _run([*command, "-o", "object.o"], cwd=scratch)
            for file in sorted(scratch.iterdir()):  # the object last
                os.replace(file, target.with_name(file.name))
    return target


def build(sources: list[Source], variant: Variant = CHECKED, *, module: str | None = None) -> Path:
    """A program of these sources, or the Python module of this name."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda s: str(_compile(s, variant)), sources))
    digest = hashlib.sha256(repr((objects, variant)).encode()).hexdigest()[:20]
    name = f"{module}{sysconfig.get_config_var('EXT_SUFFIX')}" if module else "program"
    target = _cache() / f"linked-{digest}" / name
    with _missing(target) as missing:
        if missing:
            scratch = target.with_name("unfinished")
            flags = [*variant.link, *(["-shared"] if module else []), "-o", str(scratch)]
            _run(["g++", *objects, *flags])
            os.replace(scratch, target)
    return target


def program(name: str) -> Path:
    """The program of programs/NAME.cu."""
    return build([*MACHINE, Source(HERE / "programs" / f"{name}.cu")])


def library(variant: Variant = COUNTED, contracted: Contracted = AS_WRITTEN) -> Path:
    """The file of the module of all CUDA kernels, `emulated`."""
    # The longest first, then what programs wait for too.
    return build([BINDINGS, *MACHINE, *kernels(contracted)], variant, module="emulated")


@cache
def load(variant: Variant = COUNTED, contracted: Contracted = AS_WRITTEN) -> ModuleType:
    """The module of all CUDA kernels."""
    name = "contracted.emulated" if contracted.others else "emulated"  # pybind11 has one module of each full name
    spec = importlib.util.spec_from_file_location(name, library(variant, contracted))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
