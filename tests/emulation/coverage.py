"""Which lines of csrc/cuda have run on the machine, measured by gcov."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path
from types import ModuleType

from emulation.build import CSRC

_written = Path(tempfile.mkdtemp(prefix="torchweld-coverage-"))
_lines: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))


def begin() -> None:
    """Sends the counts to a folder of this process. Must be called before the module is loaded."""
    os.environ["GCOV_PREFIX"] = str(_written)
    os.environ.pop("GCOV_PREFIX_STRIP", None)


def measure(module: ModuleType) -> dict[str, dict[int, int]]:
    """How often each line ran, by file of csrc/cuda. The counts of a template's instances are added."""
    if not _lines:
        module.write_coverage()
        for counts in _written.rglob("*.gcda"):
            original = Path("/") / counts.relative_to(_written)
            shutil.copy(original.parent.parent / "object.gcno", counts.parent)
            command = ["gcov", "--json-format", "--stdout", counts.name]
            found = subprocess.run(command, cwd=counts.parent, capture_output=True, text=True, check=True).stdout
            for file in (file for line in found.splitlines() for file in json.loads(line)["files"]):
                if (path := Path(file["file"])).is_relative_to(CSRC / "cuda"):
                    for line in file["lines"]:
                        _lines[str(path.relative_to(CSRC / "cuda"))][line["line_number"]] += line["count"]
        shutil.rmtree(_written)
    return _lines


def share(lines: dict[str, dict[int, int]]) -> float:
    counts = [count for file in lines.values() for count in file.values()]
    return sum(count > 0 for count in counts) / len(counts)


def table(lines: dict[str, dict[int, int]]) -> list[str]:
    """One row of text per file: share, name, and the lines that have not run."""
    rows = []
    for name, counts in sorted(lines.items()):
        missed = [str(line) for line, count in sorted(counts.items()) if count == 0]
        text = f"{share({name: counts}):6.1%}  {name}"
        rows.append(text + (f": not {', '.join(missed[:20])}{' ..' if len(missed) > 20 else ''}" if missed else ""))
    return [*rows, f"{share(lines):6.1%}  of {sum(map(len, lines.values()))} lines"]
