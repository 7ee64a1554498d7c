"""What the device compiler made of a kernel: its SASS as instructions, and what must hold of those that use Hopper's
tensor cores (HGMMA) whatever the compiler does. See "Asynchronous Warpgroup Level Matrix Instructions" in the PTX ISA.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

WARPGROUP = 128
NOTHING = "nothing"  # what has written a register that no instruction has

# Instructions whose first operand is read, or is no register of a thread.
_WRITES_NO_REGISTER = (
    "ST", "RED", "BAR", "SYNCS", "BRA", "EXIT", "WARP", "LDGSTS", "LDGDEPBAR", "DEPBAR", "MEMBAR", "FENCE", "BSSY",
    "BSYNC", "NOP", "CALL", "RET", "U", "R2UR", "CCTL", "ERRBAR", "BREAK", "YIELD",
)  # fmt: skip
_AFTER_A_PREDICATE = ("SHFL", "ATOM", "MATCH")  # their first operand is a predicate, the second is written
_GLOBAL = ("LDG", "STG")
_PAIRS = ("DADD", "DMUL", "DFMA", "CS2R")


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, of NVIDIA's own wheels, or the one that comes with triton."""
    found = shutil.which(name)
    for package, folder in (("nvidia", "cu13/bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(package) if found is None else None
        for place in (spec.submodule_search_locations if spec else None) or ():
            found = found or shutil.which(name, path=str(Path(place) / folder))
    return found


def library() -> Path | None:
    """The CUDA kernels that are installed."""
    spec = importlib.util.find_spec("torchweld._cuda")
    return None if spec is None or spec.origin is None else Path(spec.origin)


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # the predicate under which it runs, such as P0 or !P0; none if it always does
    opcode: str  # with its suffixes
    operands: tuple[str, ...]
    target: str | None  # label of a branch

    @cached_property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @cached_property
    def written(self) -> range:
        if self.opcode.startswith(_WRITES_NO_REGISTER):
            return range(0)
        first = 1 if self.opcode.startswith(_AFTER_A_PREDICATE) else 0
        register = re.match(r"R(\d+)$", self.operands[first]) if len(self.operands) > first else None
        return range(0) if register is None else _range(int(register[1]), self._width)

    @cached_property
    def read(self) -> frozenset[int]:
        """Registers read, but those of a product."""
        registers: set[int] = set()
        written = self.written
        for position, operand in enumerate(self.operands):
            for number, wide in re.findall(r"\bR(\d+)(\.64)?", operand):
                if position == 0 and int(number) == (written.start if written else None):
                    continue
                stored = self.opcode.startswith("ST") and position == len(self.operands) - 1
                registers.update(_range(int(number), self._width if stored else 2 if wide else 1))
        return frozenset(registers)

    @property
    def _width(self) -> int:
        suffixes = self.opcode.split(".")
        if self.name == "HGMMA":
            return int(suffixes[1].split("x")[1]) // 2
        if self.name == "LDSM":
            return int(suffixes[-1]) if suffixes[-1] in ("2", "4") else 1
        return 4 if "128" in suffixes else 2 if {"64", "WIDE"} & set(suffixes) or self.name in _PAIRS else 1

    # ---- Of a product

    @cached_property
    def left(self) -> range:
        """The registers of its left operand, none if that is in shared memory."""
        register = re.match(r"R(\d+)$", self.operands[1])
        return range(0) if register is None else _range(int(register[1]), 4)

    @property
    def adds(self) -> bool:
        """Whether it adds to its accumulator."""
        return "RZ" not in self.operands


def _range(first: int, count: int) -> range:
    return range(first, first + count)


@dataclass
class Kernel:
    name: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    @cached_property
    def following(self) -> list[tuple[int, ...]]:
        """The instructions that may come after each."""
        return [tuple(self._following(i)) for i in range(len(self.instructions))]

    def _following(self, i: int) -> Iterator[int]:
        here = self.instructions[i]
        target = self.labels.get(here.target) if here.name == "BRA" and here.target is not None else None
        if target is not None and target < len(self.instructions):
            yield target
        always = not here.guard and not re.match(r"!?U?P\d", here.operands[0] if here.operands else "")
        if not (here.name in ("EXIT", "RET", "BRA") and always) and i + 1 < len(self.instructions):
            yield i + 1

    @cached_property
    def preceding(self) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in self.instructions]
        for i, after in enumerate(self.following):
            for j in after:
                found[j].append(i)
        return found

    def products(self) -> Iterator[tuple[int, Instruction]]:
        return ((i, each) for i, each in enumerate(self.instructions) if each.name == "HGMMA")

    def writers(self, i: int, register: int) -> set[str]:
        """Names of the instructions that may have written a register last, seen from instruction i."""
        found: set[str] = set()
        seen: set[int] = set()
        work = list(self.preceding[i]) or [-1]
        if i == 0:
            work.append(-1)
        while work:
            j = work.pop()
            if j < 0:
                found.add(NOTHING)
            elif j not in seen:
                seen.add(j)
                here = self.instructions[j]
                if register in here.written:
                    found.add(here.name)
                    if not here.guard:
                        continue
                work += self.preceding[j]
                if j == 0:
                    work.append(-1)
        return found


def parse(sass: str) -> list[Kernel]:
    """The kernels in what nvdisasm prints."""
    kernels: list[Kernel] = []
    for line in sass.splitlines():
        if section := re.match(r"\.text\.(\S+):", line):
            kernels.append(Kernel(section[1]))
        elif kernels and (label := re.match(r"(\.L\S+):", line)):
            kernels[-1].labels[label[1]] = len(kernels[-1].instructions)
        elif kernels and (text := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(\S+)\s+)?(\S+)\s*(.*?)\s*;", line)):
            address, guard, opcode, rest = text.groups()
            target = re.search(r"`\((\S+)\)", rest)
            operands = tuple(x.strip() for x in re.sub(r",?\s*`\(\S+\)", "", rest).split(",") if x.strip())
            kernels[-1].instructions.append(
                Instruction(int(address, 16), guard or "", opcode, operands, target[1] if target else None)
            )
    return kernels


def _output(name: str, *arguments: object, folder: Path | None = None) -> str:
    program = tool(name)
    assert program is not None
    command = [program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout


def disassemble(cubin: Path) -> list[Kernel]:
    return parse(_output("nvdisasm", "-c", cubin))


def cubins(library: Path, folder: Path) -> dict[Path, str]:
    """The machine code in a library, as files in `folder`, with the architecture of each."""
    _output("cuobjdump", "-xelf", "all", library, folder=folder)
    return {path: path.suffixes[-2].removeprefix(".sm_") for path in sorted(folder.glob("*.cubin"))}


@dataclass(frozen=True)
class Resources:
    """Of one kernel."""

    registers: int
    stack: int  # bytes, 0 for a kernel that spills nothing


def resources(cubin: Path) -> dict[str, Resources]:
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", _output("cuobjdump", "-res-usage", cubin))
    return {name: Resources(int(registers), int(stack)) for name, registers, stack in found}


# ---- What must hold. Each returns what does not, a sentence per fault.

# What may have written an accumulator that a product adds to: a product, a new scale, zeros.
ACCUMULATOR = {"HGMMA", "FMUL", "CS2R", "IMAD", "MOV", "HFMA2", "UMOV"}


def mixed_operands(kernel: Kernel) -> Iterator[str]:
    """Registers that a product reads have one kind of source: of two, one has overwritten the other."""
    for i, product in kernel.products():
        left = set().union(*(kernel.writers(i, register) for register in product.left))
        if len(left) > 1 or NOTHING in left:
            yield f"{product.address:#x}: the left operand R{product.left.start} comes of {', '.join(sorted(left))}"
        if product.adds:
            sums = product.written
            found = set().union(*(kernel.writers(i, register) for register in sums)) - ACCUMULATOR
            if found:
                yield f"{product.address:#x}: the accumulator R{sums.start} comes of {', '.join(sorted(found))}"


_Group = tuple[tuple[range, range], ...]  # accumulator and left operand of its products


def touched_in_flight(kernel: Kernel) -> Iterator[str]:
    """From a product to the wait for its group, nothing uses its accumulator or writes its left operand."""
    if not any(True for _ in kernel.products()):
        return
    faults: dict[int, str] = {}
    seen: set[tuple[int, tuple[_Group, ...], _Group]] = set()
    work: list[tuple[int, tuple[_Group, ...], _Group]] = [(0, (), ())]
    while work:
        state = work.pop()
        if state in seen:
            continue
        seen.add(state)
        i, groups, begun = state
        here = kernel.instructions[i]
        pending = [each for group in (*groups, begun) for each in group]
        if here.name == "HGMMA":
            for accumulator, left in pending:
                if set(here.left) & set(accumulator):
                    faults[i] = "reads the accumulator of a product in flight as its left operand"
                elif set(here.written) & set(left):
                    faults[i] = "writes the left operand of a product in flight"
                elif set(here.written) & set(accumulator) and here.written != accumulator:
                    faults[i] = "writes the accumulator of another product in flight"
            begun = tuple(dict.fromkeys((*begun, (here.written, here.left))))
            if "gsb0" in here.operands:
                groups, begun = (*groups, begun), ()
        elif here.opcode.startswith("WARPGROUP.DEPBAR"):
            left_over = int(here.operands[-1], 16)
            groups = groups[len(groups) - left_over :] if left_over else ()
        else:
            for accumulator, left in pending:
                if (here.read | set(here.written)) & set(accumulator):
                    faults[i] = f"{here.opcode} uses the accumulator of a product in flight"
                elif set(here.written) & set(left):
                    faults[i] = f"{here.opcode} writes the left operand of a product in flight"
        if pending and not kernel.following[i]:
            faults[i] = "the kernel ends before its products"
        if len(groups) < 8:
            work += [(j, groups, begun) for j in kernel.following[i]]
        else:
            faults[i] = "products are begun and never waited for"
    yield from (f"{kernel.instructions[i].address:#x}: {fault}" for i, fault in sorted(faults.items()))


def register_pools(kernel: Kernel, registers: int) -> Iterator[str]:
    """What `registers` per thread at the start add up to is what the warpgroups ask for after setmaxnreg."""
    asked: dict[str, set[int]] = {"TRY_ALLOC": set(), "DEALLOC": set()}
    for each in kernel.instructions:
        if each.name == "USETMAXREG":
            asked[each.opcode.split(".")[1]].add(int(each.operands[-1], 16))
    more, fewer = asked["TRY_ALLOC"], asked["DEALLOC"]
    if not more and not fewer:
        return
    if len(more) != 1 or len(fewer) != 1:
        yield f"warpgroups ask for {sorted(more)} and {sorted(fewer)} registers, not for one number each"
        return
    (most,), (least,) = more, fewer
    fits = any(
        registers * (n + 1) == most * n + least and registers * (n + 1) * WARPGROUP <= 65536 for n in range(1, 8)
    )
    if not (fits and most > registers > least):
        yield f"{registers} registers at the start do not make {most} for some warpgroups and {least} for one"


def serialized(kernel: Kernel) -> Iterator[str]:
    """What ptxas makes of products that it cannot leave in flight: each is a group of its own, and waited for."""
    products = [each for _, each in kernel.products()]
    if len(products) > 1 and all("gsb0" in each.operands for each in products):
        yield "every product is waited for before the next begins"


def spilled(kernel: Kernel) -> int:
    """Bytes that a thread stores to its own memory."""
    widths = {"64": 8, "128": 16}
    stores = (each.opcode.split(".") for each in kernel.instructions if each.name == "STL")
    return sum(next((widths[s] for s in suffixes if s in widths), 4) for suffixes in stores)


class Accesses(NamedTuple):
    """Of global memory: loads and stores of 16 bytes, and all narrower ones."""

    loads: int
    stores: int
    narrow: int


def accesses(kernel: Kernel) -> Accesses:
    found = [(each.name, "128" in each.opcode.split(".")) for each in kernel.instructions if each.name in _GLOBAL]
    loads, stores = (sum(name == wanted and wide for name, wide in found) for wanted in _GLOBAL)
    return Accesses(loads, stores, len(found) - loads - stores)
