"""How the machine code makes each element of a result: which products and sums it has contracted into one instruction.

A kernel that stores packets of 16 bytes and the elements that are left over one by one must round both alike, or the
bits of an element depend on its place. What an element is made of is followed backwards from its store to the loads of
a tensor. The chains of instructions on that way, such as "a sum of a product of a load", are compared as sets: copies
of the same code under other conditions have the same chains.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from machine_code import Kernel

DEPTH = 3  # instructions of a chain
_ROUNDS = ("FFMA", "FMUL", "FADD")
_COUNTED = (*_ROUNDS, "MUFU")
_LOAD = -1  # in place of an instruction: the data of a tensor
_MOVES = ("MOV", "SEL", "FSEL")


class Chains(NamedTuple):
    """Of the elements that are stored in packets, and of those that are stored one by one."""

    packets: frozenset[str]
    singles: frozenset[str]


def contraction(kernel: Kernel) -> Chains:
    return _Flow(kernel).chains()


def fault(kernel: Kernel) -> str | None:
    """What packets have and single elements have not, or the other way round; None where they are alike."""
    found = contraction(kernel)
    if not found.packets or not found.singles or found.packets == found.singles:
        return None
    return (
        f"only in packets: {', '.join(sorted(found.packets - found.singles)) or 'nothing'}; "
        f"only in single elements: {', '.join(sorted(found.singles - found.packets)) or 'nothing'}"
    )


def _register(operand: str) -> int | None:
    found = re.search(r"\bR(\d+)", operand)
    return int(found[1]) if found else None


def _opposite(guard: str) -> str:
    return guard.removeprefix("!") if guard.startswith("!") else f"!{guard}"


class _Flow:
    """Where the values in registers come from. `half`: of a register with two 16-bit numbers; None for all of it."""

    def __init__(self, kernel: Kernel) -> None:
        self.instructions = kernel.instructions
        self.preceding = kernel.preceding
        self._writes: dict[int, list[int]] = defaultdict(list)  # by register
        self._starts: list[int] = []  # of the straight code that each instruction is in
        for i, here in enumerate(self.instructions):
            for register in here.written:
                self._writes[register].append(i)
            last = self.instructions[i - 1].name if self.preceding[i] == [i - 1] else "BRA"
            self._starts.append(i if last == "BRA" or "CALL" in (last, here.name) else self._starts[i - 1])
        self._writers: dict[tuple[int, int], list[int]] = {}
        self._sources: dict[tuple[int, int, int | None], frozenset[int]] = {}
        self._made_of: dict[int, list[tuple[str, frozenset[int]]]] = {}
        self._of_data: dict[int, bool] = {}
        self._found: dict[tuple[int, int], frozenset[str]] = {}

    # ---- Writers of a register

    def _before(self, i: int, wanted: str) -> Iterator[tuple[int, str]]:
        """The instructions before i on any way, and the predicate that holds there. No element outlives its iteration,
        so no way leads back through a loop."""
        for j in self.preceding[i]:
            if j < i:
                here = self.instructions[j]
                taken = here.guard if i != j + 1 else _opposite(here.guard)
                yield j, taken if not wanted and here.name == "BRA" and here.guard else wanted

    def writers(self, i: int, register: int) -> list[int]:
        """The instructions that may have written a register last, seen from instruction i."""
        if (i, register) not in self._writers:
            found: list[int] = []
            seen: set[tuple[int, str]] = set()
            work = list(self._before(i, self.instructions[i].guard))
            while work:
                j, wanted = work.pop()
                if not wanted:  # nothing else matters before the last write in this straight code
                    writes = self._writes[register]
                    last = bisect_right(writes, j) - 1
                    j = max(self._starts[j], writes[last] if last >= 0 else 0)
                here = self.instructions[j]
                # A call is for rare numbers, and a way around it has what is wanted.
                if (j, wanted) in seen or here.name == "CALL":
                    continue
                seen.add((j, wanted))
                if register in here.written:
                    if not here.guard or wanted != _opposite(here.guard):
                        found.append(j)
                    if not here.guard or wanted == here.guard:
                        continue
                    wanted = wanted or _opposite(here.guard)
                if wanted and wanted.removeprefix("!") in here.operands[:2] and here.name != "BRA":
                    wanted = ""  # the predicate was another one before
                work += self._before(j, wanted)
            self._writers[i, register] = found
        return self._writers[i, register]

    # ---- What makes a number

    def sources(self, i: int, register: int, half: int | None) -> frozenset[int]:
        """The arithmetic that made a number, through moves, choices and conversions; _LOAD where it was loaded."""
        if (i, register, half) not in self._sources:
            found: set[int] = set()
            seen: set[tuple[int, int, int | None]] = set()
            work = [(i, register, half)]
            while work:
                at = work.pop()
                if at in seen:
                    continue
                seen.add(at)
                for j in self.writers(at[0], at[1]):
                    here = self.instructions[j]
                    if here.name in _COUNTED:
                        found.add(j)
                    elif here.name.startswith("LD"):
                        # Tensors are loaded once, by .EF; the numbers of a table or a row are not of an element.
                        found.update({_LOAD} if "EF" in here.opcode.split(".") else ())
                    else:
                        work += [(j, *each) for each in self._read(j, at[2])]
            self._sources[i, register, half] = frozenset(found)
        return self._sources[i, register, half]

    def _read(self, j: int, half: int | None) -> Iterator[tuple[int, int | None]]:
        """The registers, and the halves of them, that go into a half of what instruction j writes."""
        here = self.instructions[j]
        chosen: tuple[str, int | None] | None = None
        if half is not None and here.name == "F2FP":  # packs two numbers, the high one first
            chosen = here.operands[2 - half], None
        elif half is not None and here.name == "PRMT" and here.operands[2].startswith("0x"):
            byte = int(here.operands[2], 16) >> (8 * half) & 0xF
            chosen = here.operands[1 if byte < 4 else 3], byte % 4 // 2
        elif half == 0 and here.name == "SHF" and here.operands[2] == "0x10":
            chosen = here.operands[3], 1
        if chosen is None:
            moves = here.name in _MOVES or here.opcode.startswith("IMAD.MOV")
            yield from ((register, half if moves else None) for register in here.read)
        elif (register := _register(chosen[0])) is not None:
            yield register, chosen[1]

    def _operands(self, j: int) -> list[tuple[str, frozenset[int]]]:
        """The role of each operand in a register, and what made it. FFMA has two factors and what it adds to."""
        if j not in self._made_of:
            here, found = self.instructions[j], []
            for position, operand in enumerate(here.operands[1:], 1):
                if re.match(r"[-|~]*R\d", operand) and (register := _register(operand)) is not None:
                    role = here.name if here.name != "FFMA" else "FFMA factor" if position < 3 else "FFMA addend"
                    found.append((role, self.sources(j, register, None)))
            self._made_of[j] = found
        return self._made_of[j]

    def _is_of_data(self, j: int) -> bool:
        if j not in self._of_data:
            self._of_data[j] = False  # no loop of a program made of ways forwards
            self._of_data[j] = any(
                source == _LOAD or self._is_of_data(source) for _, sources in self._operands(j) for source in sources
            )
        return self._of_data[j]

    # ---- Chains

    def _chains(self, j: int, depth: int) -> frozenset[str]:
        if depth == 0:
            return frozenset({self.instructions[j].name})
        if (j, depth) not in self._found:
            found: set[str] = set()
            for role, sources in self._operands(j):
                for source in sources:
                    if source == _LOAD:
                        found.add(f"{role} < load")
                    elif self._is_of_data(source):
                        found.update(f"{role} < {each}" for each in self._chains(source, depth - 1))
            self._found[j, depth] = frozenset(found)
        return self._found[j, depth]

    def chains(self) -> Chains:
        found: dict[bool, set[str]] = {True: set(), False: set()}
        for i, store in enumerate(self.instructions):
            if store.name == "STG" and (first := _register(store.operands[-1])) is not None:
                suffixes = store.opcode.split(".")
                halves = (0,) if "U16" in suffixes else (0, 1)
                count = 4 if "128" in suffixes else 2 if "64" in suffixes else 1
                for register in range(first, first + count):
                    for half in halves:
                        found[count > 1].update(self._of_element(self.sources(i, register, half)))
        return Chains(frozenset(found[True]), frozenset(found[False]))

    def _of_element(self, made_by: frozenset[int]) -> Iterator[str]:
        seen: set[int] = {_LOAD}
        work = list(made_by)
        while work:
            j = work.pop()
            if j not in seen:
                seen.add(j)
                if self._is_of_data(j) and self.instructions[j].name in _ROUNDS:
                    yield from self._chains(j, DEPTH)
                work += [source for _, sources in self._operands(j) for source in sources]
