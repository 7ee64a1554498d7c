"""The machine code of the attention kernels: operands of Hopper's products, and spills; see machine_code.py.

The emulation runs the sources: what the device compiler does of its own is seen here alone.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import machine_code
from emulation import build
from machine_code import Kernel

REASON = (
    "there is no nvcc"
    if shutil.which("nvcc") is None
    else None
    if machine_code.disassembler()
    else "there is no nvdisasm: neither in the CUDA toolkit nor in triton"
)

SM90 = [("90a", dtype, size) for dtype in ("__nv_bfloat16", "__half") for size in (64, 128, 256)]
SM80 = [("80", dtype, size) for dtype, sizes in build.HEAD_SIZES.items() for size in sizes]

# Bytes that a kernel may spill, by the beginning of its name. All other kernels spill nothing.
SPILLS = {
    # Tiles take 192 of 240 registers; bias, softcap or slopes need the rest.
    r"sm90::backward_bias<\w+, \d+>": 176,
    # Bias, softcap, slopes and dropout beside dkey and dvalue of head size 128.
    r"sm90::backward_keys<\w+, 128, false, true, true, false>": 16,
    r"sm90::backward_keys<\w+, 128, false, true, true, true>": 68,
    # The same beside sums of 256 columns.
    r"sm90::forward<\w+, 256, false, 2>": 16,
    r"sm90::backward_keys<\w+, 256, false, true, false, false>": 36,
    r"sm90::backward_keys<\w+, 256, false, false, true, false>": 12,
    r"sm90::backward_queries<\w+, 256, false>": 44,
    # The addresses of a paged cache, beside two TF32 numbers per float.
    r"sm80::decode_split<float, 256, true>": 20,
}


def allowed(kernel: str) -> int:
    name = kernel.removeprefix("void ").replace("torchweld::cuda::attention::", "")
    return next((most for pattern, most in SPILLS.items() if re.match(pattern, name)), 0)


def demangled(names: list[str]) -> list[str]:
    found = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return found.stdout.split("\n")


def compiled(architecture: str, dtype: str, size: int, folder: Path) -> tuple[Path, str]:
    """The cubin of an instance, and the log of ptxas."""
    source, flags = build.instance(int(architecture[:2]), dtype, size)
    cubin = folder / "instance.cubin"
    command = ["nvcc", "-std=c++17", "-O3", "-DNDEBUG", f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
    command += [*flags, "-Xptxas", "-v", f"-I{build.CSRC}", "-cubin", "-o", str(cubin), str(source)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return cubin, run.stderr


@pytest.mark.slow
@pytest.mark.skipif(REASON is not None, reason=REASON or "")
@pytest.mark.parametrize(("architecture", "dtype", "size"), SM90 + SM80, ids=lambda x: str(x).strip("_"))
def test_instance(architecture: str, dtype: str, size: int, tmp_path: Path) -> None:
    cubin, log = compiled(architecture, dtype, size, tmp_path)
    said = machine_code.reports(log)
    faults = machine_code.serialized(log)
    for name, readable in zip(said, demangled(list(said)), strict=False):
        if said[name].spilled > allowed(readable):
            faults.append(f"{readable} spills {said[name].spilled} bytes, not {allowed(readable)}")
    if architecture == "90a":
        kernels = [k for k in machine_code.disassemble(cubin) if k.name in said and any(k.products())]
        assert len(kernels) == len(said)
        for kernel in kernels:
            found = [*machine_code.mixed_operands(kernel), *machine_code.touched_in_flight(kernel)]
            found += machine_code.register_pools(kernel, said[kernel.name].registers)
            faults += [f"{kernel.name}: {fault}" for fault in found]
    assert faults == []


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


def test_what_ptxas_says() -> None:
    log = """ptxas info    : Compiling entry function '_Z6kernelv' for 'sm_90a'
    24 bytes stack frame, 20 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"""
    assert machine_code.reports(log) == {"_Z6kernelv": machine_code.Report(registers=168, spilled=20)}
    assert len(machine_code.serialized(log)) == 1
    attention = "torchweld::cuda::attention"
    assert allowed(f"void {attention}::sm90::backward_bias<__half, 64>({attention}::Backward)") == 176
    assert allowed(f"void {attention}::sm80::backward_bias<__half, 64>({attention}::Backward)") == 0
