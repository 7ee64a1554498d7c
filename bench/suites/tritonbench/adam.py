"""An operator for TritonBench, which has no optimizer: AdamW over the parameters of a GPT-2 of 1 to 12 layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from tritonbench.utils.triton_op import BenchmarkOperator, register_benchmark, register_x_val

import torchweld


class Operator(BenchmarkOperator):
    """Steps without gradients of their own: `--mode fwd_no_grad`, or fwd."""

    DEFAULT_PRECISION = "fp32"

    def get_input_iter(self) -> Iterator[tuple[list[torch.Tensor]]]:
        """Parameters with gradients, of GPT-2 with width 768."""
        for layers in (1, 2, 4, 12):
            shapes = [(50257, 768), (1024, 768), *layers * [(768,)] * 8]
            shapes += layers * [(768, 2304), (768, 768), (768, 3072), (3072, 768)]
            yield ([torch.randn(s, dtype=self.dtype, device=self.device, requires_grad=True) for s in shapes],)

    @register_x_val(label="parameters")
    def get_x_val(self, example_inputs: tuple[list[torch.Tensor]]) -> int:
        """How many numbers a step changes."""
        return sum(p.numel() for p in example_inputs[0])

    def _step(self, make: Callable[..., Any], parameters: list[torch.Tensor], **options: Any) -> Callable[[], Any]:
        own = [p.detach().clone().requires_grad_() for p in parameters]
        for p in own:
            p.grad = torch.full_like(p, 1e-3)
        optimizer = make(own, lr=1e-3, **options)
        return partial(optimizer.step)  # the suite gives what it times a name

    @register_benchmark(baseline=True)
    def torch_adamw(self, parameters: list[torch.Tensor]) -> Callable[[], Any]:
        """torch's default, which loops over lists of tensors."""
        return self._step(torch.optim.AdamW, parameters)

    @register_benchmark()
    def torch_adamw_fused(self, parameters: list[torch.Tensor]) -> Callable[[], Any]:
        """torch's fused kernels."""
        return self._step(torch.optim.AdamW, parameters, fused=True)

    @register_benchmark()
    def torchweld(self, parameters: list[torch.Tensor]) -> Callable[[], Any]:
        """One op over the list."""
        return self._step(torchweld.optim.AdamW, parameters)
