"""`kernels benchmark ./bench/suites/kernels`: each op beside torch, on the device that `kernels` finds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark


class LayerNormBenchmark(Benchmark):
    seed = 0

    def setup(self) -> None:
        self.x = torch.randn(4, 512, 768, device=self.device)
        self.weight, self.bias = torch.randn(2, 768, device=self.device)

    def benchmark_layer_norm(self) -> None:
        self.out = self.kernel.layer_norm(self.x, (768,), self.weight, self.bias)

    def verify_layer_norm(self) -> torch.Tensor:
        return F.layer_norm(self.x, (768,), self.weight, self.bias)

    def benchmark_rms_norm(self) -> None:
        self.out = self.kernel.rms_norm(self.x, (768,), self.weight, 1e-6)

    def verify_rms_norm(self) -> torch.Tensor:
        return F.rms_norm(self.x, (768,), self.weight, 1e-6)


class ActivationBenchmark(Benchmark):
    seed = 0

    def setup(self) -> None:
        self.x = torch.randn(2048, 2 * 1536, device=self.device)

    def benchmark_silu_and_mul(self) -> None:
        self.out = self.kernel.swiglu(self.x)

    def verify_silu_and_mul(self) -> torch.Tensor:
        gate, up = self.x.chunk(2, -1)
        return F.silu(gate) * up

    def benchmark_gelu_tanh(self) -> None:
        self.out = self.kernel.gelu(self.x, approximate="tanh")

    def verify_gelu_tanh(self) -> torch.Tensor:
        return F.gelu(self.x, approximate="tanh")


class AttentionBenchmark(Benchmark):
    seed = 0

    def setup(self) -> None:
        self.query, self.key, self.value = torch.randn(3, 1, 12, 512, 64, device=self.device)

    def benchmark_causal(self) -> None:
        self.out = self.kernel.scaled_dot_product_attention(self.query, self.key, self.value, is_causal=True)

    def verify_causal(self) -> torch.Tensor:
        return F.scaled_dot_product_attention(self.query, self.key, self.value, is_causal=True)

    def benchmark_full(self) -> None:
        self.out = self.kernel.scaled_dot_product_attention(self.query, self.key, self.value)

    def verify_full(self) -> torch.Tensor:
        return F.scaled_dot_product_attention(self.query, self.key, self.value)


class CrossEntropyBenchmark(Benchmark):
    seed = 0

    def setup(self) -> None:
        self.logits = torch.randn(512, 8192, device=self.device)
        self.target = torch.randint(8192, (512,), device=self.device)

    def benchmark_cross_entropy(self) -> None:
        self.out = self.kernel.cross_entropy(self.logits, self.target)

    def verify_cross_entropy(self) -> torch.Tensor:
        return F.cross_entropy(self.logits, self.target)
