"""torch.nn.Dropout on the fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from torchweld import ops
from torchweld.nn.twins import record, twin
from torchweld.ops.dropout import pays


@twin
class Dropout(torch.nn.Dropout):
    """Drop-in for `torch.nn.Dropout`: same arguments, no parameters, no buffers.

    `inplace=True`, nested tensors, dtypes and devices without kernels, and inputs too short or narrow to gain are
    left to torch.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor):  # torch's own error, or a node of torch.fx
            return record(self, super().forward, input)
        ours = self.training and not self.inplace and pays(input)
        return ops.dropout(input, self.p) if ours else super().forward(input)
