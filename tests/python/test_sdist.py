"""The source distribution: it has what a build needs, CMake accepts it, and, where asked for, it becomes a wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("sdist")]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("scikit_build_core", reason="scikit-build-core makes the sdist")
    target = tmp_path_factory.mktemp("sdist")
    program = f"from scikit_build_core.build import build_sdist; build_sdist({str(target)!r})"
    run(sys.executable, "-c", program, cwd=ROOT)
    (archive,) = target.glob("torchweld-*.tar.gz")
    with tarfile.open(archive) as tar:
        if hasattr(tarfile, "data_filter"):
            tar.extraction_filter = tarfile.data_filter
        tar.extractall(target)
    return target / archive.name.removesuffix(".tar.gz")


def test_it_has_the_sources_and_the_files_beside_them(unpacked: Path) -> None:
    for folder, pattern in (
        ("csrc", "*"),
        ("python", "*.py"),
        ("python", "*.html"),
        ("python", "*.css"),
        ("python", "*.js"),
    ):
        tracked = {
            p.relative_to(ROOT) for p in (ROOT / folder).rglob(pattern) if p.is_file() and "__pycache__" not in p.parts
        }
        found = {p.relative_to(unpacked) for p in (unpacked / folder).rglob(pattern) if p.is_file()}
        assert tracked and {p for p in tracked - found if p.suffix not in (".so", ".pyc")} == set()
    assert (unpacked / "PKG-INFO").exists() and not (unpacked / "bench" / "results").exists()


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_cmake_finds_every_source(unpacked: Path, tmp_path: Path) -> None:
    pybind11 = pytest.importorskip("pybind11", reason="the bindings are built with pybind11")
    options = (
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
        "-DTORCHWELD_CUDA=OFF",
    )
    out = run("cmake", "-S", unpacked, "-B", tmp_path / "build", *options, cwd=tmp_path)
    assert "torchweld: CPU kernels for baseline" in out


@pytest.mark.skipif(
    "TORCHWELD_TEST_WHEEL" not in os.environ, reason="builds a wheel for minutes: TORCHWELD_TEST_WHEEL=1"
)
def test_it_becomes_a_wheel_in_a_fresh_environment(unpacked: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "fresh", with_pip=True)
    python = tmp_path / "fresh" / "bin" / "python"
    wheels = tmp_path / "wheels"
    run(python, "-m", "pip", "wheel", unpacked, "--no-deps", "-w", wheels, cwd=tmp_path, TORCHWELD_CUDA="OFF")
    (wheel,) = wheels.glob("torchweld-*.whl")
    assert "none-any" not in wheel.name
