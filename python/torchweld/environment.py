"""The device and the versions that a measurement depends on."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

import torchweld
from torchweld import backend


def cpu_name() -> str:
    """The CPU's name, from the operating system."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def device_name(device: str) -> str:
    """The name of the CPU or GPU."""
    return torch.cuda.get_device_name() if device == "cuda" else cpu_name()


def versions() -> dict[str, Any]:
    """The versions that a measurement depends on."""
    found: dict[str, Any] = {
        "torchweld": torchweld.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    if isa := getattr(backend.kernels.get("cpu"), "isa", None):  # a module in its place has none
        found["cpu_isa"] = isa()
    if torch.cuda.is_available():
        found["cuda"] = torch.version.cuda
    return found
