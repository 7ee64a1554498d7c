"""torchweld: fused attention, norms, GELU, cross-entropy, Adam and SGD for PyTorch, on CPU and CUDA."""

import importlib
from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  (first: the kernels use the OpenMP runtime that torch loads)

from torchweld import flash_attention_impl, ops, reference
from torchweld.backend import use_backend

if TYPE_CHECKING:
    from torchweld import nn, optim
    from torchweld.patching import patch

__version__ = "0.1.0"
__all__ = ["nn", "ops", "optim", "patch", "reference", "use_backend"]

flash_attention_impl.register()


def __getattr__(name: str) -> Any:
    """What an import of the package need not wait for."""
    if name in ("nn", "optim"):
        return importlib.import_module(f"torchweld.{name}")
    if name == "patch":
        return importlib.import_module("torchweld.patching").patch
    raise AttributeError(f"module 'torchweld' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
