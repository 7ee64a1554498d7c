"""The scripts that accelerate brings to be launched, in two processes, where torch.optim and torch.nn are torchweld's.

They hold training under `Accelerator` to training in one process: samplers, gradient synchronisation and accumulation,
16 bits, schedulers. Left out: test_ops, which has collectives alone; test_distributed_data_loop, which waits for ever
over gloo with torch's own optimizer too; and test_ddp_comm_hook, which needs GPUs.
"""

from __future__ import annotations

import importlib
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torchweld_in_place

from gloo_processes import WORLD, needs_gloo

pytest.importorskip("accelerate")

SCRIPTS = ["test_script", "test_sync"]


def launched(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    os.environ["MASTER_PORT"] = str(port)
    torchweld_in_place.in_torch()
    from accelerate.state import AcceleratorState, GradientState  # noqa: PLC0415

    # Each script ends its process group; one for all is kept, as gloo may fail to connect the next while one closes.
    destroy, dist.destroy_process_group = dist.destroy_process_group, lambda group=None: dist.barrier()
    for name in SCRIPTS:
        importlib.import_module(f"accelerate.test_utils.scripts.{name}").main()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    destroy()


@needs_gloo
def test_scripts_of_accelerate() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(launched, (port,), nprocs=WORLD)
