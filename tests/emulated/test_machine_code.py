"""The machine code that is installed: operands of Hopper's products, spills, 16-byte accesses; see machine_code.py.

The emulation runs the sources: what the device compiler does of its own is seen here alone.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

import machine_code
from machine_code import Accesses, Kernel
from shipped_kernels import Cubin, needs_machine_code, short

# Bytes that a kernel may spill, by the beginning of its name. All other kernels spill nothing.
SPILLS = {
    # Tiles take 192 of 240 registers; bias, softcap or slopes need the rest.
    r"sm90::backward_bias<\w+, \d+>": 28,
    # Bias, softcap, slopes and dropout beside dkey, dvalue and dquery of head size 128, and beside sums of 256 columns.
    r"sm90::backward_keys<\w+, 128, false, true, true, true>": 8,
    r"sm90::backward_keys<\w+, 256, false, true, false, false>": 16,
    # The addresses of a paged cache, beside two TF32 numbers per float.
    r"sm80::decode_split<float, 256, true>": 20,
}


class Least(NamedTuple):
    """The loads and stores of 16 bytes that a kernel has at least, and the narrower accesses that it has at most.

    `narrow` is None where rows may begin or end within a vector.
    """

    loads: int
    stores: int
    narrow: int | None = None

    def are_in(self, found: Accesses) -> bool:
        narrow = found.narrow if self.narrow is None else self.narrow
        return found.loads >= self.loads and found.stores >= self.stores and found.narrow <= narrow


# By the beginning of a kernel's name. V is 8 elements of 16 bits or 4 of 32; a kernel of single elements has none.
VECTORS = {
    r"activation::forward<.*, [48]>": Least(2, 2, narrow=2),  # the elements after the last vector, one by one
    r"activation::backward<.*, [48]>": Least(4, 2, narrow=3),
    r"activation::forward_rows<.*, [48]>": Least(4, 2, narrow=3),
    r"activation::backward_rows<.*, [48]>": Least(6, 4, narrow=5),
    r"loss::forward<.*, [48]>": Least(5, 0),
    r"loss::backward<.*, [48]>": Least(2, 2),
    r"norm::forward_rows<.*, 32, [48]>": Least(4, 4),
    r"norm::forward_rows<.*, 8, [48]>": Least(1, 1),
    r"norm::backward_rows<.*, 32, [48], ": Least(8, 4),
    r"norm::backward_rows<.*, 8, [48], ": Least(2, 1),
    r"optimizer::step<.*Adam": Least(4, 3),
    r"optimizer::step<.*Sgd": Least(2, 1),
    r"rotary::turn<.*, [48]>": Least(21, 17, narrow=1),  # the position; 4 heads either way, columns, what is copied
}


def allowed(kernel: str) -> int:
    return next((most for pattern, most in SPILLS.items() if re.match(pattern, short(kernel))), 0)


class TestShipped:
    pytestmark = needs_machine_code

    def test_nothing_else_spills(self, shipped: list[Cubin]) -> None:
        """A kernel without a stack frame has no spills."""
        kernels = [(cubin.architecture, *each) for cubin in shipped for each in cubin.kernels.values()]
        assert len(kernels) > 300
        faults = [f"{name} on {a}: {r.stack} bytes of stack" for a, name, r in kernels if r.stack and not allowed(name)]
        assert faults == []

    @pytest.mark.parametrize("size", [64, 128, 256])
    @pytest.mark.parametrize("dtype", ["__nv_bfloat16", "__half"])
    def test_products_of_hopper(self, shipped: list[Cubin], dtype: str, size: int) -> None:
        faults: list[str] = []
        count = 0
        for cubin in shipped:
            if not any(re.match(rf"sm90::\w+<{dtype}, {size}\b", short(name)) for name, _ in cubin.kernels.values()):
                continue
            assert cubin.architecture == "90a"
            for kernel in machine_code.disassemble(cubin.path):
                if kernel.name not in cubin.kernels:
                    continue
                readable, resources = cubin.kernels[kernel.name]
                assert any(kernel.products()), readable
                found = [*machine_code.mixed_operands(kernel), *machine_code.touched_in_flight(kernel)]
                found += machine_code.serialized(kernel)
                found += machine_code.register_pools(kernel, resources.registers)
                if machine_code.spilled(kernel) > allowed(readable):
                    found.append(f"spills {machine_code.spilled(kernel)} bytes, not {allowed(readable)}")
                faults += [f"{readable}: {fault}" for fault in found]
                count += 1
        if count == 0:
            pytest.skip("not built for sm_90a")
        assert count >= 8 and faults == []

    def test_tensors_move_by_16_bytes(self, shipped: list[Cubin]) -> None:
        seen: set[str] = set()
        faults: list[str] = []
        for cubin in shipped:
            wanted = {
                n: (p, least)
                for n, (r, _) in cubin.kernels.items()
                for p, least in VECTORS.items()
                if re.match(p, short(r))
            }
            if not wanted:
                continue
            found = {kernel.name: machine_code.accesses(kernel) for kernel in machine_code.disassemble(cubin.path)}
            for name, (pattern, least) in wanted.items():
                seen.add(pattern)
                if not least.are_in(found[name]):
                    faults.append(f"{cubin.kernels[name][0]} on {cubin.architecture}: {found[name]}")
        assert seen == set(VECTORS) and faults == []


# ---- Planted faults, in a shortened loop of a kernel: a left operand, a product, a wait.

LOOP = """
.text.kernel:
        /*0000*/                   CS2R R24, SRZ ;
        /*0010*/                   LDSM.16.M88.4 R60, [R2] ;
.L_x_1:
        /*0020*/                   F2FP.BF16.F32.PACK_AB R64, R5, R4 ;
        /*0030*/                   F2FP.BF16.F32.PACK_AB R65, R5, R4 ;
        /*0040*/                   F2FP.BF16.F32.PACK_AB R66, R5, R4 ;
        /*0050*/                   F2FP.BF16.F32.PACK_AB R67, R5, R4 ;
        /*0060*/                   WARPGROUP.ARRIVE ;
        /*0070*/                   HGMMA.64x8x16.F32.BF16 R24, R64, gdesc[UR8], RZ, !UPT ;
        /*0080*/                   HGMMA.64x8x16.F32.BF16 R24, R64, gdesc[UR4], R24, gsb0 ;
        /*0090*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR43+0x20000], R10 ;
        /*00a0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00b0*/                   FADD R4, R24, R4 ;
        /*00c0*/              @!P0 BRA `(.L_x_1) ;
        /*00d0*/                   STG.E.128 desc[UR10][R2.64], R24 ;
        /*00e0*/                   EXIT ;
"""


def faults_of(code: str) -> list[str]:
    (kernel,) = machine_code.parse(code)
    return [*machine_code.mixed_operands(kernel), *machine_code.touched_in_flight(kernel)]


def changed(old: str, new: str) -> list[str]:
    assert old in LOOP
    return faults_of(LOOP.replace(old, new))


def line(instruction: str) -> str:
    return f"        /*00ff*/                   {instruction} ;\n"


def test_a_loop_without_a_fault() -> None:
    assert faults_of(LOOP) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        # A left operand that is loaded before the loop, and registers of it that the loop gives to others.
        ("LDSM.16.M88.4 R60", "LDSM.16.M88.4 R72", None),
        ("R24, R64, gdesc[UR8]", "R24, R60, gdesc[UR8]", None),
        ("F2FP.BF16.F32.PACK_AB R64, R5, R4 ;\n", "NOP ;\n", "the left operand R64 comes of F2FP, nothing"),
        ("R65, R5, R4 ;\n        /*0040*/", "R60, R5, R4 ;\n        /*0040*/", "comes of F2FP, nothing"),
        # An accumulator that holds something else than a sum.
        ("WARPGROUP.ARRIVE ;\n        /*0070*/                   HGMMA.64x8x16.F32.BF16 R24, R64, gdesc[UR8], RZ, !UPT",
         "LDS R26, [R2]", "the accumulator R24 comes of LDS"),
        # Registers of a product in flight.
        ("WARPGROUP.DEPBAR.LE gsb0, 0x0", "NOP", "FADD uses the accumulator of a product in flight"),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1", "FADD uses the accumulator"),
        ("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR43+0x20000], R10", "MOV R66, R10", "MOV writes the left operand"),
        ("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR43+0x20000], R10", "STS.64 [R10], R26", "STS.64 uses the accumulator"),
        ("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR43+0x20000], R10",
         "HGMMA.64x8x16.F32.BF16 R64, gdesc[UR8], RZ, !UPT, gsb0", "writes the left operand of a product in flight"),
        ("FADD R4, R24, R4", "HGMMA.64x8x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT, gsb0", "STG.E.128 uses the"),
    ],
)  # fmt: skip
def test_planted_fault(old: str, new: str, fault: str | None) -> None:
    found = changed(old, new)
    assert found == [] if fault is None else any(fault in each for each in found), found


def test_a_left_operand_that_a_loop_overwrites() -> None:
    """The code of ptxas 12.9 and 13.0 for a left operand that stays in registers."""
    inside = LOOP.replace("R24, R64, gdesc[UR8]", "R24, R60, gdesc[UR8]")
    inside = inside.replace("FADD R4, R24, R4 ;\n", "FADD R4, R24, R4 ;\n" + line("F2FP.BF16.F32.PACK_AB R61, R5, R4"))
    assert any("the left operand R60 comes of F2FP, LDSM" in each for each in faults_of(inside))


def test_registers_that_do_not_add_up() -> None:
    def kernel(most: int, least: int) -> Kernel:
        code = f".text.kernel:\n{line(f'USETMAXREG.TRY_ALLOC.CTAPOOL UP0, {most:#x}')}"
        (parsed,) = machine_code.parse(code + line(f"USETMAXREG.DEALLOC.CTAPOOL {least:#x}") + line("EXIT"))
        return parsed

    assert list(machine_code.register_pools(kernel(240, 24), 168)) == []
    assert list(machine_code.register_pools(kernel(160, 32), 128)) == []
    for most, least, start in ((240, 32, 168), (168, 24, 168), (240, 24, 160), (160, 24, 160)):
        assert list(machine_code.register_pools(kernel(most, least), start)) != []


def test_products_that_the_compiler_serializes() -> None:
    """The code of ptxas where it says C7510 to C7515: it gives every product a group of its own."""
    (kernel,) = machine_code.parse(LOOP)
    assert list(machine_code.serialized(kernel)) == []
    (kernel,) = machine_code.parse(LOOP.replace("gdesc[UR8], RZ, !UPT", "gdesc[UR8], RZ, !UPT, gsb0"))
    assert len(list(machine_code.serialized(kernel))) == 1


def test_accesses() -> None:
    code = ".text.kernel:\n" + "".join(map(line, (
        "LDG.E.EF.128 R4, desc[UR4][R2.64]", "@P0 LDG.E.128.CONSTANT R8, desc[UR4][R2.64+0x10]", "LDG.E.U16 R1, [R2]",
        "STG.E.128.STRONG.SM desc[UR4][R2.64], R4", "STG.E.64 desc[UR4][R2.64], R4", "LDS.128 R4, [R2]", "EXIT",
    )))  # fmt: skip
    (kernel,) = machine_code.parse(code)
    found = machine_code.accesses(kernel)
    assert found == Accesses(2, 1, narrow=2)
    assert Least(2, 1, narrow=2).are_in(found) and Least(1, 0).are_in(found)
    assert not any(least.are_in(found) for least in (Least(3, 1), Least(2, 2), Least(2, 1, narrow=1)))


def test_spills() -> None:
    code = "".join(line(f"{store} [R1+0x8], R4") for store in ("STL", "STL.64", "@P0 STL.128"))
    (kernel,) = machine_code.parse(".text.kernel:\n" + code + line("LDL R4, [R1]") + line("EXIT"))
    assert machine_code.spilled(kernel) == 28
    attention = "torchweld::cuda::attention"
    assert allowed(f"void {attention}::sm90::backward_bias<__half, 64>({attention}::Backward)") == 28
    assert allowed(f"void {attention}::sm80::backward_bias<__half, 64>({attention}::Backward)") == 0
    assert allowed("void torchweld::cuda::norm::(anonymous namespace)::forward_rows<float, 8>(int)") == 0
