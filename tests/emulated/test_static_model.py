"""bench/static_model.py on a canned listing: loops, their usual path, what the model makes of it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

import machine_code

# A warpgroup that multiplies and one that loads. Each has a path that is not usual: a wait for every copy, a mask.
ATTENTION = """
.text.attention:
        /*0000*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0 ;
.L_x_1:
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8], R2 ;
        /*0020*/              @!P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R88, R4, gdesc[UR8], R88, gsb0 ;
        /*0050*/               @P1 BRA `(.L_x_3) ;
        /*0060*/                   FSEL R4, R4, -INF , P2 ;
        /*0070*/                   FSEL R5, R5, -INF , P2 ;
.L_x_3:
        /*0080*/                   MUFU.EX2 R6, R6 ;
        /*0090*/               @P0 BRA `(.L_x_2) ;
        /*00a0*/                   EXIT ;
.L_x_4:
        /*00b0*/               @P0 BRA `(.L_x_5) ;
        /*00c0*/                   DEPBAR.LE SB0, 0x0 ;
        /*00d0*/                   SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR4], RZ ;
.L_x_5:
        /*00e0*/               @P1 BRA `(.L_x_6) ;
        /*00f0*/                   LDGSTS.E.BYPASS.128.ZFILL [R4], desc[UR4][R2.64], P0 ;
        /*0100*/                   BRA `(.L_x_7) ;
.L_x_6:
        /*0110*/                   LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64] ;
        /*0120*/                   IADD3 R2, P0, R2, UR5, RZ ;
.L_x_7:
        /*0130*/                   LDGDEPBAR ;
        /*0140*/               @P0 BRA `(.L_x_4) ;
        /*0150*/                   EXIT ;
"""

# 16 bytes are read and 8 written.
ROWS = """
.text.rows:
.L_x_1:
        /*0000*/                   LDG.E.EF.128 R4, desc[UR4][R2.64] ;
        /*0010*/                   FADD R4, R4, R5 ;
        /*0020*/                   STG.E.64.STRONG.SM desc[UR4][R2.64], R4 ;
        /*0030*/               @P0 BRA `(.L_x_1) ;
        /*0040*/                   EXIT ;
"""


@pytest.fixture(scope="module")
def model() -> ModuleType:
    path = Path(__file__).parents[2] / "bench" / "static_model.py"
    spec = importlib.util.spec_from_file_location("static_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["static_model"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_a_step_of_attention(model: ModuleType) -> None:
    (kernel,) = machine_code.parse(ATTENTION)
    step, load = model.loops(kernel)
    assert [each.address for each in step.instructions] == [0x30, 0x40, 0x50, 0x80, 0x90]
    assert [each.address for each in load.instructions] == [0xB0, 0xE0, 0x110, 0x120, 0x130, 0x140]
    assert step.tensor() == 64 * (128 + 64) * 16 * 2 / 4096 and step.flops() == 2 * 64 * (128 + 64) * 16
    assert step.shared() == (64 * 16 * 2 + (128 + 64) * 16 * 2) / 128  # one left operand is in registers
    assert load.units() == {"branches": 3, "copies": 1, "integer": 1, "barriers": 1}
    _, _, _, clocks, bound = model.describe(kernel, "attention", model.GPUS["h100"])
    assert clocks == "  clocks per step: tensor 192, exp2 16, issue 16, shared 128"
    # 2 warpgroups, 96 clocks of tensor cores each: all of 4096 FLOPs per clock and multiprocessor.
    assert bound == f"  at most {4096 * 1.755e9 * 132 / 1e12:.0f} TFLOP/s of products done, bound by tensor"


def test_bytes_of_a_row(model: ModuleType) -> None:
    (kernel,) = machine_code.parse(ROWS)
    (loop,) = model.loops(kernel)
    assert loop.bytes() == 24 and len(loop.path) == 4
    *_, share = model.describe(kernel, "rows", model.GPUS["h100"])
    taken = 4 / 4 / (32 * 24 / (3.0e12 / 1.755e9 / 132))
    assert share == f"  24 bytes, 2.7 instructions per 16; issue takes {taken:.0%} of the time of a copy"


def test_from_a_listing(model: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listing = tmp_path / "kernels.sass"
    listing.write_text(ATTENTION + ROWS)
    sys_argv, sys.argv = sys.argv, ["static_model.py", str(listing), "--kernel", "rows", "--gpu", "h200"]
    try:
        model.main()
    finally:
        sys.argv = sys_argv
    assert capsys.readouterr().out.startswith("rows\n  a thread: 4 instructions: global 2, float 1, branches 1\n")
