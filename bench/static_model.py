"""What the machine code of the kernels lets one expect of them before a GPU has run it.

For each main loop: its instructions by the unit that runs them, and the time that the busiest unit needs.

    python bench/static_model.py [FILE ...] [--kernel REGEX] [--gpu h100]

FILE is a .cubin, or a listing of `nvdisasm -c` (.sass); without one, the CUDA kernels that are installed. Needs
nvdisasm, cuobjdump and c++filt.

What is assumed:
- A loop runs its usual path. Of all paths from its head back to it that is the one with the most products, copies,
  shuffles, reductions and 16-byte accesses, and of these the shortest. So a norm or an optimizer step has all of its
  optional tensors, and no tile is masked. Paths where a loader waits for every copy, or copies less than 16 bytes, are
  not usual.
- A multiprocessor has four schedulers, and each issues one instruction per clock.
- Attention on Hopper: each scheduler has one warp of each warpgroup. So a step issues the loop of a multiplying warp
  once per multiplying warpgroup, and the loop of the loader once.
- All units overlap perfectly: the busiest gives the time of a step. Latencies, waits and conflicts come on top.
- backward_keys that also adds dquery at D 64 does so in every step. In truth it is every other one.

unit      clocks of a multiprocessor
tensor    m64nNk16: 64 * N * 16 * 2 / 4096
exp2      8 per warp and instruction of MUFU: each scheduler has 4 lanes of 32
issue     1 per warp and instruction
shared    a product reads 64 x 16 numbers (left, unless in registers) and N x 16 (right) at 128 bytes per clock
memory    of kernels without products: the bytes of all accesses at the rate of a copy
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import machine_code
from machine_code import Instruction, Kernel


@dataclass(frozen=True)
class Gpu:
    multiprocessors: int
    clock: float  # Hz, under load
    copy: float  # bytes per second of a device-to-device copy, read and written


GPUS = {"h100": Gpu(132, 1.755e9, 3.0e12), "h200": Gpu(132, 1.755e9, 4.3e12)}

# By the beginning of an opcode, the first that fits.
UNITS = (
    ("HGMMA", "tensor"), ("HMMA", "tensor"), ("MUFU", "MUFU"), ("LDGSTS", "copies"), ("LDGDEPBAR", "barriers"),
    ("LDG", "global"), ("STG", "global"),
    ("RED", "global"), ("ATOM", "global"), ("LDL", "spills"), ("STL", "spills"), ("LDS", "shared"), ("STS", "shared"),
    ("SYNCS", "barriers"), ("BAR", "barriers"), ("MEMBAR", "barriers"), ("FENCE", "barriers"), ("DEPBAR", "barriers"),
    ("WARP", "barriers"), ("FFMA", "float"), ("FADD", "float"), ("FMUL", "float"),
    ("FMNMX", "float"), ("FSEL", "float"), ("FSETP", "float"), ("F2F", "convert"), ("HADD2", "convert"),
    ("SHFL", "shuffle"),
    ("BRA", "branches"), ("BSSY", "branches"), ("BSYNC", "branches"), ("U", "uniform"), ("R2UR", "uniform"),
)  # fmt: skip


def unit(each: Instruction) -> str:
    return next((name for start, name in UNITS if each.opcode.startswith(start)), "integer")


def worth(each: Instruction) -> int:
    """1 for what a loop is there for."""
    if each.name == "LDGSTS":
        return int("ZFILL" not in each.opcode or "128" not in each.opcode)  # 8 bytes: statistics, always cut to size
    wide = each.name in ("LDG", "STG") and "128" in each.opcode.split(".")
    return int(
        wide or each.name in ("HGMMA", "RED", "REDG", "MEMBAR", "SHFL") or each.opcode.startswith("SYNCS.ARRIVE")
    )


def unusual(each: Instruction) -> bool:
    """The loader waits for every copy, or it copies single elements."""
    return (each.opcode == "DEPBAR.LE" and each.operands[-1] == "0x0") or each.opcode == "STS.U16"


@dataclass
class Loop:
    """The usual path through one loop."""

    kernel: Kernel
    first: int
    last: int  # the branch back
    path: list[int]

    @property
    def instructions(self) -> list[Instruction]:
        return [self.kernel.instructions[i] for i in self.path]

    def count(self, start: str) -> int:
        return sum(each.opcode.startswith(start) for each in self.instructions)

    def units(self) -> Counter[str]:
        return Counter(unit(each) for each in self.instructions)

    def bytes(self) -> int:
        """Of global memory, that one thread reads or writes."""
        widths = {"128": 16, "64": 8, "U16": 2, "U8": 1}
        moving = (each.opcode.split(".") for each in self.instructions if each.name in ("LDG", "STG"))
        return sum(next((widths[suffix] for suffix in suffixes if suffix in widths), 4) for suffixes in moving)

    def tensor(self) -> float:
        return sum(64 * n * 16 * 2 / 4096 for n in self._columns())

    def shared(self) -> float:
        """Clocks of the reads of products."""
        lefts = sum(64 * 16 * 2 for each in self.instructions if each.name == "HGMMA" and not each.left)
        return (lefts + sum(n * 16 * 2 for n in self._columns())) / 128

    def flops(self) -> int:
        return sum(2 * 64 * n * 16 for n in self._columns())

    def _columns(self) -> Iterator[int]:
        for each in self.instructions:
            if each.name == "HGMMA":
                yield int(each.opcode.split(".")[1].split("x")[1])


def loops(kernel: Kernel) -> list[Loop]:
    """Every innermost loop with products, copies or 16-byte accesses."""
    backwards = [(j, i) for i, after in enumerate(kernel.following) for j in after if j <= i]
    work = [bool(worth(each)) and each.name in ("HGMMA", "LDGSTS", "LDG", "STG") for each in kernel.instructions]
    found = [(first, last) for first, last in backwards if any(work[first : last + 1])]
    inner = [a for a in found if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in found)]
    return [Loop(kernel, first, last, path) for first, last in sorted(inner) if (path := _usual(kernel, first, last))]


def _usual(kernel: Kernel, first: int, last: int) -> list[int]:
    """Most worth, then fewest instructions. Branches go forwards inside: those that do not are loops of their own."""
    best: dict[int, tuple[int, int]] = {first: (worth(kernel.instructions[first]), -1)}
    came_from: dict[int, int] = {}
    for i in range(first, last):
        if i not in best:
            continue
        for j in kernel.following[i]:
            here = kernel.instructions[j]
            if not i < j <= last or unusual(here):
                continue
            value = (best[i][0] + worth(here), best[i][1] - 1)
            if j not in best or value > best[j]:
                best[j], came_from[j] = value, i
    if last not in best:
        return []
    path = [last]
    while path[-1] != first:
        path.append(came_from[path[-1]])
    return path[::-1]


# ---- The page


def groups(kernel: Kernel) -> int:
    """How many warpgroups multiply, by the registers that they ask for."""
    asked = [int(each.operands[-1], 16) for each in kernel.instructions if "TRY_ALLOC" in each.opcode]
    return 3 if asked and asked[0] < 200 else 2


def describe(kernel: Kernel, name: str, gpu: Gpu) -> Iterator[str]:
    found = loops(kernel)
    products = [each for each in found if each.count("HGMMA")]
    copies = [each for each in found if each.count("LDGSTS") and not each.count("HGMMA")]
    if products and copies:
        yield name
        step, load = max(products, key=Loop.flops), max(copies, key=lambda each: len(each.path))
        yield from (_line("a warp that multiplies", step), _line("a warp that loads", load))
        n = groups(kernel)
        clocks = {
            "tensor": n * step.tensor(),
            "exp2": 8.0 * n * step.count("MUFU"),
            "issue": float(n * len(step.path) + len(load.path)),
            "shared": n * step.shared(),
        }
        slowest = max(clocks, key=lambda each: clocks[each])
        rate = n * step.flops() / clocks[slowest] * gpu.clock * gpu.multiprocessors / 1e12
        yield "  clocks per step: " + ", ".join(f"{each} {value:.0f}" for each, value in clocks.items())
        yield f"  at most {rate:.0f} TFLOP/s of products done, bound by {slowest}"
        return
    moving = [each for each in found if each.bytes()]
    yield from [name] if moving else []
    for loop in moving:
        yield _line("a thread", loop)
        per_clock = gpu.copy / gpu.clock / gpu.multiprocessors
        share = len(loop.path) / 4 / (32 * loop.bytes() / per_clock)
        per_16 = 16 * len(loop.path) / loop.bytes()
        yield (
            f"  {loop.bytes()} bytes, {per_16:.1f} instructions per 16; issue takes {share:.0%} of the time of a copy"
        )


def _line(who: str, loop: Loop) -> str:
    units = ", ".join(f"{name} {count}" for name, count in loop.units().most_common())
    return f"  {who}: {len(loop.path)} instructions: {units}"


def kernels(files: list[Path], folder: Path) -> Iterator[Kernel]:
    if not files:
        library = machine_code.library()
        if library is None:
            sys.exit("torchweld._cuda is not installed: name a .cubin or .sass file")
        files = list(machine_code.cubins(library, folder))
    for file in files:
        yield from machine_code.parse(file.read_text()) if file.suffix == ".sass" else machine_code.disassemble(file)


def readable(name: str) -> str:
    found = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"void |\(anonymous namespace\)::|torchweld::cuda::|\([^()]*\)$", "", found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--kernel", default="", help="a regular expression")
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for kernel in kernels(arguments.files, Path(folder)):
            name = readable(kernel.name)
            if re.search(arguments.kernel, name):
                for line in describe(kernel, name, GPUS[arguments.gpu]):
                    print(line, flush=True)


if __name__ == "__main__":
    main()
