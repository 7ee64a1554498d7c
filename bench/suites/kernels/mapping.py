"""The mapping by which `kernelize` puts torchweld into a model.

with kernels.use_kernel_mapping(mapping(stage(Path("staged")))):
    model = kernels.kernelize(model, mode=kernels.Mode.TRAINING)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kernels import LocalLayerRepository

_DEVICES = ("cpu", "cuda")
# By the name that a model's layer has in `use_kernel_forward_from_hub`.
_LAYERS = {"RMSNorm": "RMSNorm", "LayerNorm": "LayerNorm", "SiluAndMul": "SiluAndMul", "NewGELU": "GeluTanh"}


def mapping(repository: Path) -> dict[str, dict[str, Any]]:
    """Of the repository that `stage` wrote."""
    return {
        name: {device: LocalLayerRepository(repository, layer_name=layer) for device in _DEVICES}
        for name, layer in _LAYERS.items()
    }
