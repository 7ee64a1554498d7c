"""torch.nn.Dropout on the fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from torchweld import backend, ops
from torchweld.nn.twins import twin
from torchweld.ops._arguments import KERNEL_DTYPES
from torchweld.ops._register import compiling

# From so many elements and columns on, forward and backward take less time than torch's. A row costs a batch of words.
_PAYS, _COLUMNS = 2048, 8


@twin
class Dropout(torch.nn.Dropout):
    """Drop-in for `torch.nn.Dropout`: same arguments, no parameters, no buffers.

    `inplace=True`, nested tensors, dtypes and devices without kernels, and inputs too short or narrow to gain are
    left to torch.
    """

    def forward(self, input: Tensor) -> Tensor:
        served = input.dtype in KERNEL_DTYPES and input.device.type in backend.kernels
        if not self.training or self.inplace or input.is_nested or not served:
            return super().forward(input)
        short = not compiling() and (input.numel() < _PAYS or input.shape[-1] < _COLUMNS)
        return super().forward(input) if short else ops.dropout(input, self.p)
