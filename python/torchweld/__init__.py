"""torchweld: fused attention, layer norm and Adam kernels for PyTorch, on CPU and CUDA."""

import torch  # noqa: F401  (first: the kernels use the OpenMP runtime that torch loads)

from torchweld import ops, reference
from torchweld.backend import use_backend

__version__ = "0.1.0"
__all__ = ["ops", "reference", "use_backend"]
