"""`torchweld info`: which backend serves which op on this machine, and the reasons."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

import torch

from torchweld import backend
from torchweld.console import console
from torchweld.environment import cpu_name, versions

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> None:
    """Adds `torchweld info`."""
    parser = subparsers.add_parser(
        "info", help="what runs where here, and why not", description="Versions, backends, and who serves each op."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.set_defaults(func=run)


def _cpu() -> dict[str, Any]:
    found: dict[str, Any] = {"device": cpu_name(), "unavailable": backend.unavailable("cpu")}
    found["threads"] = torch.get_num_threads()
    if "cpu" in backend.kernels:
        module = backend.kernels["cpu"]
        found |= {"isa": module.isa(), "isas_available": module.available_isas(), "isas_built": module.built_isas()}
    return found


def _cuda() -> dict[str, Any]:
    found: dict[str, Any] = {"device": None, "unavailable": backend.unavailable("cuda")}
    found["torch_cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        found["capability"] = "sm_{}{}".format(*torch.cuda.get_device_capability())
    else:
        found["remedy"] = "a GPU with its driver, and a torch that is built for CUDA (https://pytorch.org/get-started)"
    if "cuda" not in backend.kernels:
        found["remedy"] = "reinstall with nvcc on PATH or in CUDACXX; with TORCHWELD_CUDA=ON its absence is an error"
    else:
        module = backend.kernels["cuda"]
        found |= {"architectures": module.architectures(), "runtime": module.runtime_version()}
        found["driver"] = module.driver_version()
    return found


def _who_serves(device: str) -> dict[str, dict[str, str | None]]:
    """For each op the backend that serves its first case on `device`, found by a run, and why no kernels do."""
    from torchweld import testing  # noqa: PLC0415  (`--help` need not wait for it)

    served: dict[str, dict[str, str | None]] = {}
    for op, cases in testing.ops().items():
        inputs = cases[0].inputs(torch.float32, device)
        try:
            with backend.strict():
                cases[0].ours(inputs)
            served[op] = {"backend": backend.active(device), "why": None}
        except backend.NotServedError as error:
            served[op] = {"backend": "reference", "why": error.reason}
        except RuntimeError as error:  # TORCHWELD_BACKEND forces a backend of the other device
            served[op] = {"backend": None, "why": str(error)}
    return served


def collect() -> dict[str, Any]:
    """Everything that `torchweld info --json` prints."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {
        "versions": versions(),
        "cpu": _cpu(),
        "cuda": _cuda(),
        "ops": {device: _who_serves(device) for device in devices},
    }


def run(args: argparse.Namespace) -> int:
    """Prints the tables, or the JSON."""
    from rich.table import Table  # noqa: PLC0415  (not needed for --json)

    found = collect()
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    out = console()
    out.print("  ".join(f"{name} {found['versions'][name]}" for name in ("torchweld", "torch", "python")))

    backends = Table("backend", "state", "device", "details", title="Backends", title_justify="left")
    for name in ("cpu", "cuda"):
        each = dict(found[name])
        state, device = each.pop("unavailable"), each.pop("device")
        details = "\n".join(f"{key.replace('_', ' ')}: {_shown(value)}" for key, value in each.items())
        backends.add_row(name, "[green]available" if state is None else f"[yellow]{state}", device or "none", details)
    backends.add_row("reference", "[green]available", "any", "pure PyTorch: every op, dtype and device")
    out.print(backends)

    title = "Who serves float32 tensors"
    served = Table("op", *found["ops"], title=title, title_justify="left", min_width=len(title))
    for op in found["ops"]["cpu"]:
        here = [devices[op] for devices in found["ops"].values()]
        served.add_row(op, *(f"{h['backend'] or 'nothing'}" + (f": {h['why']}" if h["why"] else "") for h in here))
    out.print(served)
    return 0


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
