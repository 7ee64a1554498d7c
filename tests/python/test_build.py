"""What the compiled modules are made of: what they link, what they export, and which instruction set runs."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch

import fresh
import torchweld
from torchweld import _cpu, backend

ROOT = Path(__file__).resolve().parents[2]
ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}
ISA_FLAGS["avx512_bf16"] = [*ISA_FLAGS["avx512"], "-mavx512bf16"]
ISA_FLAGS["amx"] = [*ISA_FLAGS["avx512_bf16"], "-mamx-tile", "-mamx-bf16"]
MODULES = [m.__file__ for m in backend.kernels.values()]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF files")


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


def test_the_version_is_that_of_the_package() -> None:
    assert importlib.metadata.version("torchweld") == torchweld.__version__
    assert f'"{torchweld.__version__}"' not in (ROOT / "pyproject.toml").read_text()


@linux
@pytest.mark.parametrize("path", MODULES, ids=[Path(str(m)).name.split(".")[0] for m in MODULES])
def test_links_neither_torch_nor_openmp_nor_cuda(path: str) -> None:
    libraries = run("readelf", "-d", path).stdout
    assert "(NEEDED)" in libraries
    for forbidden in ("libtorch", "libc10", "libgomp", "libomp", "libcuda"):
        assert forbidden not in libraries


@linux
def test_openmp_is_left_to_torch() -> None:
    symbols = run("nm", "-D", "--undefined-only", str(_cpu.__file__)).stdout
    assert "GOMP_parallel" in symbols  # used, and found at run time in what torch loaded
    assert "_ZN5torch" not in symbols
    assert "_ZN2at" not in symbols


@cache
def builds() -> list[Path]:
    """The folders where CMake has built a release in this checkout."""
    caches = (ROOT / "build").glob("**/CMakeCache.txt")
    return [path.parent for path in caches if "CMAKE_BUILD_TYPE:STRING=Release" in path.read_text()]


@cache
def changed() -> float:
    """When a source of the kernels was last written."""
    return max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp"))


def object_of(source: Path, isa: str) -> Path | None:
    """What a build has made of a kernel's source as it is now."""
    name = f"CMakeFiles/cpu_{isa}.dir/{source.relative_to(ROOT)}.o"
    found = (folder / name for folder in builds() if (folder / name).exists())
    return next((path for path in found if path.stat().st_mtime > changed()), None)


@pytest.mark.slow
@linux
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("isa", ISA_FLAGS)
def test_no_weak_symbol_leaks_from_an_instruction_set(isa: str, tmp_path: Path) -> None:
    """A weak symbol compiled for AVX-512 could be the one that the linker keeps for everybody."""

    def symbols(source: Path) -> list[list[str]]:
        if (built := object_of(source, isa)) is not None:
            return [line.split() for line in run("nm", str(built)).stdout.splitlines()]
        target = tmp_path / f"{source.parent.name}_{source.stem}.o"
        # Line by line is all that is asked of the code here, so the smallest optimisation that still inlines will do.
        flags = ["-std=gnu++17", "-Og", "-fno-exceptions", "-fopenmp", "-w", f"-DTORCHWELD_ISA={isa}", *ISA_FLAGS[isa]]
        compiled = run("g++", *flags, f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(target))
        assert compiled.returncode == 0, compiled.stderr
        return [line.split() for line in run("nm", str(target)).stdout.splitlines()]

    # isa.cpp is compiled once, for the baseline; amx has its own kernels of matrix products alone.
    sources = [path for path in sorted((ROOT / "csrc" / "cpu").rglob("*.cpp")) if path.name != "isa.cpp"]
    if isa == "amx":
        sources = [path for path in sources if "TORCHWELD_ISA {" in path.read_text()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for found in pool.map(symbols, sources):
            assert not [s[-1] for s in found if s[-2] in "WVu"]
            exported = [s[-1] for s in found if s[-2] in "TDRB"]
            assert exported
            assert all(isa in name for name in exported)


def test_the_forced_instruction_set_is_what_runs() -> None:
    script = (
        "import torch, torchweld; from torchweld import _cpu; torch.manual_seed(0); "
        "x = torch.randn(64, 1000); y = torchweld.ops.layer_norm(x, (1000,)); "
        "import hashlib; print(_cpu.isa(), hashlib.sha256(y.numpy().tobytes()).hexdigest())"
    )
    seen = {}
    for isa in _cpu.available_isas():
        result = fresh.python(script, TORCHWELD_CPU_ISA=isa)
        assert result.returncode == 0, result.stderr
        name, digest = result.stdout.split()
        assert name == isa  # a name that each table takes from its own compiler flags
        seen[isa] = digest
    # Vectors of another width add in another order: the last bits tell them apart.
    widths = [isa for isa in seen if isa not in ("avx512_bf16", "avx512_bf16_fma", "amx")]
    assert len({seen[isa] for isa in widths}) == len(widths)


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
@pytest.mark.parametrize(
    ("prints", "expected"),
    [
        ("9.0", "90a-real"),
        ("8.0", "80"),
        ("8.6\n9.0\n9.0", "80;90a-real"),
        ("12.0", "80"),
        ("7.5", "80;90a-real"),
        ("No devices were found", "80;90a-real"),
    ],
)
def test_cuda_code_is_built_for_the_gpus_that_are_here(prints: str, expected: str, tmp_path: Path) -> None:
    tool, script = tmp_path / "nvidia-smi", tmp_path / "ask.cmake"
    tool.write_text(f"#!/bin/sh\nprintf '{prints}\\n'\n")
    tool.chmod(0o755)
    script.write_text(
        f'include({ROOT}/csrc/cuda/architectures.cmake)\ndefault_architectures(found)\nmessage(STATUS "<${{found}}>")\n'
    )
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["cmake", "-P", str(script)], env=environment, capture_output=True, text=True, check=True)
    assert f"<{expected}>" in done.stdout


@pytest.mark.skipif("avx512_bf16_fma" not in _cpu.available_isas(), reason="needs an Intel CPU with AVX-512 BF16")
def test_products_by_multiply_adds_beside_bf16_conversions() -> None:
    q, k, v = (torch.randn(1, 2, 40, 64, dtype=torch.bfloat16) for _ in range(3))

    def results(isa: str) -> tuple[torch.Tensor, torch.Tensor]:
        _cpu.use_isa(isa)
        return torchweld.ops.scaled_dot_product_attention(q, k, v), torchweld.ops.gelu(q)

    before = _cpu.isa()
    mixed, converting, products = map(results, ("avx512_bf16_fma", "avx512_bf16", "avx512"))
    _cpu.use_isa(before)
    assert torch.equal(mixed[0], products[0]) and not torch.equal(mixed[0], converting[0])
    assert torch.equal(mixed[1], converting[1])


@pytest.mark.parametrize("isa", ["sse9", "AVX2"])
def test_an_unknown_instruction_set_is_named(isa: str) -> None:
    script = "import torch, torchweld; torchweld.ops.layer_norm(torch.ones(2, 2), (2,))"
    result = fresh.python(script, TORCHWELD_CPU_ISA=isa)
    assert result.returncode != 0
    assert f"TORCHWELD_CPU_ISA: unknown instruction set '{isa}'; this machine can use" in result.stderr
    with pytest.raises(ValueError, match="unknown instruction set"):
        _cpu.use_isa(isa)


def test_threads_are_those_of_torch(threads: None) -> None:
    """One pool: the process runs no more threads after our kernels than torch had started."""
    torch.set_num_threads(2)
    torch.ones(1 << 22).add_(1).sum()
    before = len(os.listdir("/proc/self/task")) if sys.platform.startswith("linux") else 0
    _ = torch.nn.functional.layer_norm(torch.randn(4096, 768), (768,))
    from torchweld import ops  # noqa: PLC0415

    ops.layer_norm(torch.randn(4096, 768), (768,))
    after = len(os.listdir("/proc/self/task")) if sys.platform.startswith("linux") else 0
    assert after == before


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_asking_for_cuda_without_a_compiler_says_what_to_do(tmp_path: Path) -> None:
    defines = ("TORCHWELD_CUDA=ON", f"pybind11_DIR={_pybind11_dir()}", f"Python_EXECUTABLE={sys.executable}")
    arguments = ["-S", str(ROOT), "-B", str(tmp_path), *(f"-D{d}" for d in defines)]
    result = run("cmake", *arguments, CUDACXX="/nonexistent/nvcc", PATH="/usr/bin:/bin")
    assert result.returncode != 0
    assert "TORCHWELD_CUDA=ON, but no CUDA compiler was found. Set CUDACXX=/path/to/nvcc" in " ".join(
        result.stderr.split()
    )


def _pybind11_dir() -> str:
    pybind11 = pytest.importorskip("pybind11")
    return str(pybind11.get_cmake_dir())
