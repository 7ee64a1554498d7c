"""Stages a repository of Hugging Face's `kernels` with torchweld: layers, functions, benchmark and metadata.

    python bench/suites/kernels/stage.py DIR
    kernels benchmark DIR

The kernel has no code of its own for a device: it calls the torchweld that is installed.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import shutil
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_BACKENDS = {"cpu": {"type": "cpu"}, "cuda": {"type": "cuda", "archs": ["8.0", "9.0"]}}


def stage(target: Path) -> Path:
    """Writes the repository, and returns its folder."""
    for backend, described in _BACKENDS.items():
        folder = target / "build" / f"torch-{backend}"
        shutil.copytree(_HERE / "torchweld_kernels", folder, ignore=shutil.ignore_patterns("__pycache__"))
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
        digests = {name: base64.b64encode(hashlib.sha256((folder / name).read_bytes()).digest()) for name in files}
        metadata = {
            "id": f"_torchweld_kernels_{backend}",
            "name": "torchweld-kernels",
            "version": 1,
            "license": "BSD-3-Clause",
            "python-depends": [],
            "backend": described,
            "digest": {"algorithm": "sha256", "files": {name: digest.decode() for name, digest in digests.items()}},
        }
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
    shutil.copytree(_HERE / "benchmarks", target / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    print(stage(parser.parse_args().target))


if __name__ == "__main__":
    main()
