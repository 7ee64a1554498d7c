"""keep_memory: freed memory is not faulted in again, on the main thread of a process that glibc serves."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import torchweld

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another libc is left as it is")

STEPS = """
import resource
import torch
import torchweld
{before}
def step():
    x = torch.ones(10 << 20)  # 40 MB
    x + x * x

faults = []
for _ in range(10):
    count = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - count)
print(min(faults))
"""


def run(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@glibc
@pytest.mark.slow
def test_freed_memory_is_not_faulted_in_again() -> None:
    """Nor on ordinary pages; and an import alone leaves malloc as it is."""
    default = int(run(STEPS.format(before="")))
    kept = int(run(STEPS.format(before="torchweld.keep_memory()")))
    small = "import torchweld.memory as m; m._on_huge_pages = lambda libc: False; m.keep_memory()"
    assert default > 20000
    assert kept < default / 20
    assert int(run(STEPS.format(before=small))) < default / 20


@glibc
def test_a_second_call_changes_nothing_and_the_log_says_what_was_done() -> None:
    out = run(
        "import logging, torchweld\n"
        "logging.basicConfig(level=logging.INFO, format='%(message)s')\n"
        "import sys; logging.getLogger().handlers[0].setStream(sys.stdout)\n"
        "size = lambda: int(open('/proc/self/statm').read().split()[0])\n"
        "first = torchweld.keep_memory(); before = size()\n"
        "assert torchweld.keep_memory() is first and first.kept and size() == before"
    )
    assert out.startswith(f"keep_memory: glibc {platform.libc_ver()[1]} keeps what is freed")


@glibc
def test_a_limit_on_addresses_leaves_huge_pages_out() -> None:
    out = run(
        "import resource, torch, torchweld\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)\n"
        "kept = torchweld.keep_memory(); assert kept.kept and not kept.huge_pages\n"
        "print(torch.ones(1 << 24).sum().item())"
    )
    assert out == str(float(1 << 24))


@glibc
def test_another_malloc_is_named_and_left(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or pytest.skip("needs a C compiler to make another malloc")
    source, library = tmp_path / "malloc.c", tmp_path / "libother.so"
    source.write_text(
        "#include <stddef.h>\nvoid *__libc_malloc(size_t);\nvoid *malloc(size_t n) { return __libc_malloc(n); }\n"
    )
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    found = run("import torchweld; print(torchweld.keep_memory())", LD_PRELOAD=str(library))
    assert found == "libother.so serves malloc, and is left as it is"


def test_another_system_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    found = torchweld.keep_memory.__wrapped__()
    assert not found.kept and str(found) == "the libc of darwin serves malloc, and is left as it is"


def test_a_report_of_patch_names_it() -> None:
    import torch  # noqa: PLC0415

    model = torch.nn.Sequential(torch.nn.LayerNorm(8))
    report = torchweld.patch(model)
    assert "torchweld.keep_memory()" in str(report)
    assert "keep_memory" not in str(report.undo())
