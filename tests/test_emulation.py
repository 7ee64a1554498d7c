"""The machine that runs the CUDA kernels on the CPU (tests/emulation): it must find every mistake planted for it."""

from __future__ import annotations

import re
import subprocess

import pytest

from emulation import build

_REASON = build.unavailable()
pytestmark = pytest.mark.skipif(_REASON is not None, reason=f"the CUDA kernels cannot be built for the CPU: {_REASON}")

# What is said of each planted mistake: block and thread, the line, and what is wrong with it.
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
    "endless_wait": "waits for ever: nothing happens any more in the block but threads that look for a change",
    "out_of_bounds_store": "out of range: 4 bytes at byte 256 of shared memory, of which the launch asked for 256",
    "out_of_bounds_load": "out of range: 4 bytes at byte 256 of shared memory, of which the launch asked for 256",
    "read_of_poison": "read of poison: nobody has written byte 28 of shared memory",
    "read_of_static_poison": "read of poison: nobody has written static shared memory",
    "misaligned_load": "misaligned address: 16 bytes at 0x",
    "null_pointer": "invalid address (nil)",
}


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    """What the machine says of each kernel of programs/planted.cu."""
    run = subprocess.run([build.program("planted")], capture_output=True, text=True, check=True)
    return dict(line.split(": ", 1) for line in run.stdout.splitlines())


def test_every_planted_mistake_is_expected(found: dict[str, str]) -> None:
    assert found.keys() == PLANTED.keys()


@pytest.mark.parametrize("name", PLANTED)
def test_planted_mistake_is_found(name: str, found: dict[str, str]) -> None:
    source = (build.HERE / "programs/planted.cu").read_text().splitlines()
    match = re.match(r"\[(\w+)\] block \(0, 0, 0\) thread \(\d+, 0, 0\), planted.cu:(\d+): (.*)", found[name])
    assert match, found[name]
    kernel, line, message = match.groups()
    assert kernel == name
    first = next(i for i, text in enumerate(source, 1) if f" {name}(" in text)
    assert first <= int(line) <= first + 7
    assert message.startswith(PLANTED[name]), message
