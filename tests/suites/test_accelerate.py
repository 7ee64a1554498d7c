"""The scripts that accelerate brings to be launched, in two processes, where torch.optim and torch.nn are torchweld's.

They hold training under `Accelerator` to training in one process: samplers, gradient synchronisation and accumulation,
16 bits, schedulers, collectives. Left out: test_distributed_data_loop, which waits for ever over gloo with torch's own
optimizer too, and test_ddp_comm_hook, which needs GPUs.
"""

from __future__ import annotations

import importlib
import os
import socket

import pytest
import torch
import torchweld_in_place

from gloo_processes import WORLD, needs_gloo

pytest.importorskip("accelerate")

SCRIPTS = ["test_script", "test_sync", "test_ops"]


def launched(rank: int, ports: list[int]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    torchweld_in_place.in_torch()
    from accelerate.state import AcceleratorState, GradientState  # noqa: PLC0415

    for name, port in zip(SCRIPTS, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        importlib.import_module(f"accelerate.test_utils.scripts.{name}").main()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@needs_gloo
def test_scripts_of_accelerate() -> None:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in SCRIPTS]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    torch.multiprocessing.spawn(launched, (ports,), nprocs=WORLD)
