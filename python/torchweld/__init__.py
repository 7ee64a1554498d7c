"""torchweld: fused attention, norms, activations, rotary embeddings, losses and optimizers, on CPU and CUDA."""

import importlib
from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  (first: the kernels use the OpenMP runtime that torch loads)

from torchweld import ops, reference
from torchweld.backend import use_backend
from torchweld.integrations import torch_sdpa
from torchweld.ops._register import serve_dtensors

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchweld import distributed, nn, optim
    from torchweld.integrations import hugging_face
    from torchweld.memory import keep_memory
    from torchweld.patching import patch

__version__ = "0.1.0"
__all__ = ["distributed", "hugging_face", "keep_memory", "nn", "ops", "optim", "patch", "reference", "use_backend"]

torch_sdpa.register()


def _rules_for_dtensors() -> "Callable[..., Any]":
    found: Callable[..., Any] = importlib.import_module("torchweld.distributed.rules").call
    return found


serve_dtensors(_rules_for_dtensors)


def __getattr__(name: str) -> Any:
    """Names that are imported at their first use, so that `import torchweld` is short."""
    if name in ("distributed", "nn", "optim"):
        return importlib.import_module(f"torchweld.{name}")
    if name == "hugging_face":
        return importlib.import_module("torchweld.integrations.hugging_face")
    if name == "keep_memory":
        return importlib.import_module("torchweld.memory").keep_memory
    if name == "patch":
        return importlib.import_module("torchweld.patching").patch
    raise AttributeError(f"module 'torchweld' has no attribute {name!r}")


def __dir__() -> list[str]:
    return ["__version__", *__all__]
