"""The machine of tests/emulation must find every planted mistake."""

from __future__ import annotations

import os
import re
import subprocess
from typing import NamedTuple

import pytest

from emulation import build

_REASON = build.unavailable()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_REASON is not None, reason=f"the CUDA kernels cannot be built for the CPU: {_REASON}"),
]

# The error of each planted mistake, after its block, thread and line.
PLANTED = {
    "missing_barrier": "read of poison: nobody has written byte 128 of shared memory",
    "missing_syncwarp": "read of poison: nobody has written byte 4 of shared memory",
    "race_of_two_writers": "race: writes byte 0 of shared memory, which thread 0 writes too, and nothing orders",
    "missing_second_barrier": "race: reads byte 252 of shared memory, which thread 63 writes, and nothing orders",
    "divergent_barrier": "waits for ever at __syncthreads: of the 64 threads of the block 63 wait and 1 have ended",
    "divergent_shuffle": "waits for ever at __shfl_xor_sync: of the 64 threads of the block 32 wait and 32 have ended",
    "different_collectives": "lanes of one warp are at different collectives: __syncwarp with mask 0xffffffff here, "
    "__shfl_xor_sync with mask 0xffffffff there",
    "shuffle_beyond_the_mask": "__shfl_xor_sync: lane 0 asks lane 16, which the mask 0x0000ffff leaves out",
    "mask_without_the_caller": "__shfl_xor_sync: mask 0x0000ffff leaves out lane 16, which calls it",
    "barrier_at_two_places": "lanes of one warp are at different places: __syncthreads at planted.cu:",
    "product_at_two_places": "lanes of one warp are at different places: mma.m16n8k16 at planted.cu:",
    "endless_wait": "waits for ever: every thread that can run only polls",
    "out_of_bounds_store": "out of range: 4 bytes at byte 256 of shared memory, of which the launch asked for 256",
    "out_of_bounds_load": "out of range: 4 bytes at byte 256 of shared memory, of which the launch asked for 256",
    "read_of_poison": "read of poison: nobody has written byte 28 of shared memory",
    "read_of_static_poison": "read of poison: nobody has written static shared memory",
    "misaligned_load": "misaligned address: 16 bytes at 0x",
    "null_pointer": "invalid address (nil)",
    "overrun_into_the_slack": "out of range: 4 bytes at byte 1304 of shared memory, of which the launch asked for 1264",
    "exact_reciprocal": "exact_reciprocal: expected a quotient of 2",
    "missing_barrier_in_global_memory": "race: writes global memory at 0x, which thread 0 of block 0 reads",
    "missing_syncwarp_in_global_memory": "race: writes global memory at 0x, which thread 0 of block 0 reads",
    "two_writers_of_a_word": "race: writes global memory at 0x, which thread 0 of block 0 writes too",
    "two_writers_of_a_byte": "race: writes global memory at 0x, which thread 1 of block 0 writes too",
    "plain_write_beside_an_atomic": "race: writes global memory at 0x, which thread 0 of block 0 writes too",
    "copy_of_what_another_thread_writes": "race: writes global memory at 0x, which thread 0 of block 0 reads",
    "write_beside_a_copy_in_flight": "race: a copy in flight reads global memory at 0x, which thread 63 of block 0",
    "bulk_store_read_too_early": "race: writes global memory at 0x, which thread 62 of block 0 reads",
    "bulk_load_of_what_another_thread_writes": "race: reads global memory at 0x, which thread 63 of block 0",
    "blocks_write_one_word": "race: writes global memory at 0x, which thread 0 of block 0 writes too",
    "block_reads_what_another_writes": "race: writes global memory at 0x, which thread 0 of block 0 reads, and nothing",
    "plain_read_of_an_accumulator": "race: reads global memory at 0x, which thread 0 of block 0 writes",
    "non_coherent_load_of_own_write": "a non-coherent load reads global memory at 0x, which thread 0 of block 0",
    "missing_fence_before_the_counter": "race: reads global memory at 0x, which thread 62 of block 0 writes",
    "fence_of_the_block_only": "race: reads global memory at 0x, which thread 62 of block 0 writes, and nothing orders",
    "missing_fence_after_the_counter": "race: reads global memory at 0x, which thread 62 of block 0 writes",
    "missing_barrier_before_the_fence": "race: reads global memory at 0x, which thread 63 of block 0",
    "non_coherent_load_of_a_part": "a non-coherent load reads global memory at 0x, which thread 62 of block 0",
    "flag_without_fences": "race: reads global memory at 0x, which thread 0 of block 0 writes, and nothing orders",
    "flag_of_a_plain_store": "race: reads global memory at 0x, which thread 0 of block 0 writes, and nothing orders",
    "missing_barrier_after_the_wait": "race: reads global memory at 0x, which thread 1 of block 0 writes, and nothing",
    "missing_syncwarp_after_the_wait": "race: reads global memory at 0x, which thread 0 of block 0 writes, and nothing",
    "chain_by_numbers": "waits for ever: every thread that can run only polls",
    "wait_for_a_later_block": "waits for ever: every thread that can run only polls",
    "barrier_of_a_grid_that_does_not_fit": "waits for ever: every thread that can run only polls",
    "too_many_blocks": "a grid of 2097153 blocks, of which the machine knows at most 2097152",
    "phase_error": "read of poison: nobody has written byte 1276 of shared memory",
    "too_few_bytes_expected": "waits for ever at mbarrier.try_wait: of the 64 threads of the block 64 wait",
    "too_many_arrive": "mbarrier.arrive: more threads than the 63 that the mbarrier counts",
    "mbarrier_without_init": "read of poison: nobody has written byte 8 of shared memory",
    "slot_reused_too_early": "byte 1028 of shared memory is touched before the asynchronous copy of thread 0 to it has",
    "missing_proxy_fence": "an asynchronous instruction reads byte 1024 of shared memory, which thread 0 has written: "
    "fence.proxy.async belongs between",
    "missing_fence_of_a_copy": "an asynchronous instruction reads byte 1024 of shared memory, which thread 0 has "
    "written: fence.proxy.async belongs between",
    "store_reused_too_early": "byte 1024 of shared memory is written while an asynchronous instruction may still",
    "store_not_waited_for": "the block has ended while a bulk store of thread 0 still reads its shared memory",
    "wrong_named_barrier": "waits for ever at bar.sync: of the 64 threads of the block 64 wait and 0 have ended",
    "arrives_twice": "bar.arrive: warp 0 arrives twice in one phase of barrier 1",
    "halves_of_warps": "bar.sync: only lanes 0x0000ffff of warp 0 are at the barrier",
    "missing_wgmma_fence": "wgmma.mma_async: wgmma.fence belongs between the use of its registers and this",
    "missing_wgmma_wait": "the block has ended while products of warp 0 are not waited for",
    "matrix_overwritten_too_early": "byte 1024 of shared memory is written while an asynchronous instruction may still",
    "accumulator_read_in_flight": "a register of a wgmma in flight is touched: wgmma.wait_group belongs before",
    "left_operand_written_in_flight": "a register of a wgmma in flight is touched: wgmma.wait_group belongs before",
    "left_operand_after_the_fence": "wgmma.mma_async: wgmma.fence belongs between the use of its registers and this",
    "accumulator_after_the_fence": "wgmma.mma_async: wgmma.fence belongs between the use of its registers and this",
    "wgmma_at_two_places": "lanes of one warp are at different places: wgmma.fence at planted_sm90.cu:",
    "wrong_swizzle": "read of poison: nobody has written byte 5120 of shared memory",
    "matrix_off_its_alignment": "wgmma: the descriptor begins at shared address 2192, in row 1 of an atom of 1024",
    "matrix_beyond_the_field": "wgmma: the start of a descriptor is 264192 bytes; expected a multiple of 16",
    "more_registers_than_there_are": "waits for ever at setmaxnreg.inc: of the 384 threads of the block 32 wait",
    "registers_of_half_a_warpgroup": "setmaxnreg: warp 2 has 168 registers, warp 0 of its warpgroup 24",
    "fewer_by_an_increase": "setmaxnreg.inc: from 168 registers to 160",
}
PROGRAMS = ("planted", "planted_blocks", "planted_sm90")


class Found(NamedTuple):
    program: str
    error: str


@pytest.fixture(scope="module")
def found() -> dict[str, Found]:
    """The error of each kernel of programs/planted*.cu."""
    errors: dict[str, Found] = {}
    for program in PROGRAMS:
        of_program = run_planted(program)
        assert errors.keys().isdisjoint(of_program)
        errors |= {name: Found(program, error) for name, error in of_program.items()}
    return errors


def run_planted(program: str, seed: int = 0) -> dict[str, str]:
    environment = os.environ | {"TORCHWELD_EMULATION_SEED": str(seed)}
    run = subprocess.run([build.program(program)], env=environment, capture_output=True, text=True, check=True)
    return dict(line.split(": ", 1) for line in run.stdout.splitlines())


def test_every_planted_mistake_is_expected(found: dict[str, Found]) -> None:
    assert found.keys() == PLANTED.keys()


@pytest.mark.parametrize("name", PLANTED)
def test_planted_mistake_is_found(name: str, found: dict[str, Found]) -> None:
    program, error = found[name]
    source = (build.HERE / f"programs/{program}.cu").read_text().splitlines()
    thread = rf" thread \(\d+, 0, 0\), (?:.*called from )?{program}.cu:(\d+)"
    place = rf"\[(\w+)\] block \(\d+, 0, 0\)(?:{thread})?: (.*)"
    match = re.match(place, error)
    assert match, error
    kernel, line, message = match.groups()
    assert kernel == name and re.sub("memory at 0x[0-9a-f]+", "memory at 0x", message).startswith(PLANTED[name])
    if line is None:  # what no thread has done is at no line
        assert any(text in message for text in ("the block has ended", "of its warpgroup", "a grid of"))
        return
    first = next(i for i, text in enumerate(source, 1) if f" {name}(" in text)
    assert first <= int(line) <= first + 15


@pytest.mark.parametrize("seed", (1, 2))
def test_planted_mistake_between_blocks_is_found_on_every_schedule(seed: int) -> None:
    for name, error in run_planted("planted_blocks", seed).items():
        assert error.startswith(f"[{name}] ") and "nothing was found" not in error, error


def test_device_guard() -> None:
    """The guard creates no context on a device that the thread does not use, and restores the current one."""
    run = subprocess.run([build.program("device_guard")], capture_output=True, text=True, check=False)
    lines = run.stdout.splitlines()
    assert len(lines) == 6 and all(line.endswith(": right") for line in lines), run
