"""torch.nn.Dropout on the fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from torchweld import ops
from torchweld.nn.twins import twin
from torchweld.ops._arguments import KERNEL_DTYPES

_PAYS = 2048  # elements from which forward and backward take less time than torch's


@twin
class Dropout(torch.nn.Dropout):
    """Drop-in for `torch.nn.Dropout`: same arguments, no parameters, no buffers.

    `inplace=True`, nested tensors, dtypes without kernels and inputs too short to gain are left to torch.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.inplace or input.is_nested or input.dtype not in KERNEL_DTYPES:
            return super().forward(input)
        if not torch.compiler.is_dynamo_compiling() and input.numel() < _PAYS:
            return super().forward(input)
        return ops.dropout(input, self.p)
