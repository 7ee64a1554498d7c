"""An element has the same bits in a packet of 16 bytes and beside it: see contraction.py."""

from __future__ import annotations

import re

import pytest

import contraction
import machine_code
from shipped_kernels import Cubin, chosen, needs_machine_code

# Kernels that store packets and single elements; and those of which one instance stores packets and another one single
# elements, by where tensors begin. By the beginnings of their names.
BOTH = r"optimizer::step<|activation::.*, [48]>|loss::backward<.*, [48]>"
EITHER = r"activation::|loss::backward<|rotary::turn<"


@pytest.mark.parametrize("family", ["optimizer::step<", "activation::", "loss::backward<", "rotary::turn<"])
class TestShipped:
    pytestmark = needs_machine_code

    def test_packets_and_single_elements(self, shipped: list[Cubin], family: str) -> None:
        faults = []
        instances: dict[tuple[str, str], dict[bool, frozenset[str]]] = {}
        count = 0
        for architecture, name, kernel in chosen(shipped, family):
            found = contraction.contraction(kernel)
            if re.match(BOTH, name):
                assert found.packets and found.singles, name
                if problem := contraction.fault(kernel):
                    faults.append(f"{name} on {architecture}: {problem}")
            if re.match(EITHER, name):
                head, width = re.split(r", (?=\d+>)", name.split("(")[0], maxsplit=1)
                single = width == "1>"
                instances.setdefault((architecture, head), {})[single] = found.singles if single else found.packets
            count += 1
        assert count >= 6 and faults == []
        differ = {key: pair[True] ^ pair[False] for key, pair in instances.items() if pair[True] != pair[False]}
        assert differ == {} and all(pair[True] for pair in instances.values())


# ---- A planted fault. y = a * x + b * z, in a packet of two words of bfloat16 and in a loop of single elements.

CODE = """
.text.kernel:
        /*0000*/                   LDG.E.EF.128 R4, [R2.64] ;
        /*0010*/                   LDG.E.EF.128 R8, [R2.64+0x10] ;
        /*0020*/                   IMAD.U32 R12, R4, 0x10000, RZ ;
        /*0030*/                   IMAD.U32 R13, R8, 0x10000, RZ ;
        /*0040*/                   FMUL R14, R12, R30 ;
        /*0050*/                   FFMA R14, R13, R31, R14 ;
        /*0060*/                   LOP3.LUT R12, R4, 0xffff0000, RZ, 0xc0, !PT ;
        /*0070*/                   LOP3.LUT R13, R8, 0xffff0000, RZ, 0xc0, !PT ;
        /*0080*/                   FMUL R15, R12, R30 ;
        /*0090*/                   FFMA R15, R13, R31, R15 ;
        /*00a0*/                   F2FP.BF16.F32.PACK_AB R16, R15, R14 ;
        /*00b0*/                   F2FP.BF16.F32.PACK_AB R17, R15, R14 ;
        /*00c0*/                   MOV R18, R17 ;
        /*00d0*/                   F2FP.BF16.F32.PACK_AB R19, R15, R14 ;
        /*00e0*/                   STG.E.128 [R2.64], R16 ;
.L_x_1:
        /*00f0*/                   LDG.E.EF.U16 R4, [R2.64] ;
        /*0100*/                   LDG.E.EF.U16 R5, [R2.64+0x10] ;
        /*0110*/                   IMAD.U32 R4, R4, 0x10000, RZ ;
        /*0120*/                   IMAD.U32 R5, R5, 0x10000, RZ ;
        /*0130*/                   FMUL R6, R4, R30 ;
        /*0140*/              @!P0 FMUL R6, R4, R32 ;
        /*0150*/                   FFMA R6, R5, R31, R6 ;
        /*0160*/                   F2FP.BF16.F32.PACK_AB R6, RZ, R6 ;
        /*0170*/                   PRMT R7, R6, 0x7610, R7 ;
        /*0180*/                   STG.E.U16 [R2.64], R7 ;
        /*0190*/               @P1 BRA `(.L_x_1) ;
        /*01a0*/                   EXIT ;
"""


def fault_of(old: str = "", new: str = "") -> str | None:
    assert old in CODE
    (kernel,) = machine_code.parse(CODE.replace(old, new) if old else CODE)
    return contraction.fault(kernel)


def test_what_elements_are_made_of() -> None:
    (kernel,) = machine_code.parse(CODE)
    found = contraction.contraction(kernel)
    assert found.packets == found.singles == {"FMUL < load", "FFMA factor < load", "FFMA addend < FMUL < load"}
    assert fault_of() is None


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        # The high element of each word: not contracted, then contracted the other way round.
        ("FFMA R15, R13, R31, R15", "FADD R15, R13, R15", "only in packets: FADD < FMUL < load, FADD < load;"),
        ("FFMA R15, R13, R31, R15", "FFMA R15, R13, R15, R31", "only in packets: FFMA factor < FMUL < load"),
        # The low one of a single word.
        ("R17, R15, R14", "R17, R15, R12", None),  # not computed at all
        ("FMUL R14, R12, R30", "FADD R14, R12, R30", "only in packets: FADD < load, FFMA addend < FADD < load"),
        # A single element, always or under a condition.
        ("FFMA R6, R5, R31, R6", "FADD R6, R5, R6", "only in single elements: FADD < FMUL < load, FADD < load"),
        ("@!P0 FMUL R6, R4, R32", "@!P0 FADD R6, R4, R32", "only in single elements: FADD < load, FFMA addend < FADD"),
        # A half of the word that is not stored, and code that no element is made by.
        ("PACK_AB R6, RZ, R6", "PACK_AB R6, R33, R6", None),
        ("/*0170*/", "/*0170*/ FADD R40, R4, R5 ;\n        /*0170*/", None),
    ],
)
def test_planted_fault(old: str, new: str, fault: str | None) -> None:
    found = fault_of(old, new)
    assert found is None if fault is None else found is not None and fault in found, found


def test_the_half_that_is_stored() -> None:
    other = CODE.replace("PRMT R7, R6, 0x7610, R7", "PRMT R7, R6, 0x7632, R7")
    (kernel,) = machine_code.parse(other)
    assert contraction.contraction(kernel).singles == frozenset()  # the high half is RZ
    (kernel,) = machine_code.parse(other.replace("PACK_AB R6, RZ, R6", "PACK_AB R6, R6, RZ"))
    assert contraction.fault(kernel) is None and contraction.contraction(kernel).singles


def test_what_a_condition_overwrites() -> None:
    """Two writes under opposite conditions leave nothing of an earlier number, nor does a branch around a write."""
    line = "        /*00ff*/                   {} ;\n"
    start = "".join(map(line.format, ("LDG.E.EF R4, [R2.64]", "FMUL R5, R4, R4", "FADD R6, R4, R4")))
    end = "".join(map(line.format, ("STG.E [R2.64], R5", "EXIT")))
    ways = {
        "@P0 MOV R5, R6|@!P0 MOV R5, R6": {"FADD < load"},
        "@P0 MOV R5, R6|ISETP.NE.AND P0, PT, R2, RZ, PT|@!P0 MOV R5, R6": {"FADD < load", "FMUL < load"},
        "@P0 MOV R5, R6": {"FADD < load", "FMUL < load"},
        "@!P0 MOV R5, R6|@P0 BRA `(.L_x_1)|STG.E [R2.64], R5|EXIT": {"FADD < load", "FMUL < load"},
    }
    for between, chains in ways.items():
        code = ".text.kernel:\n" + start + "".join(map(line.format, between.split("|"))) + ".L_x_1:\n" + end
        (kernel,) = machine_code.parse(code)
        assert contraction.contraction(kernel).singles == chains, between
    alone = f"@!P0 MOV R5, R6|@P0 BRA `(.L_x_1)|{'STG.E [R2.64], R5'}|EXIT|"
    code = ".text.kernel:\n" + start + "".join(map(line.format, alone.strip("|").split("|")))
    (kernel,) = machine_code.parse(code + ".L_x_1:\n" + line.format("EXIT"))
    assert contraction.contraction(kernel).singles == {"FADD < load"}
