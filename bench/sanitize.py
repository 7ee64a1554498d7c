"""Every CUDA kernel once along each of its code paths, on small inputs; bench/gpu.sh runs it under the sanitizer."""

from __future__ import annotations

import torch

import torchweld

# Columns by code path: tests/layer_norm_cases.py says which.
COLUMNS = (1, 8, 64, 255, 257, 768, 1280, 2049, 2056, 8193, 16392)


def layer_norm(cols: int, dtype: torch.dtype) -> None:
    x, residual, doutput, dsum = (torch.randn(9, cols, device="cuda").to(dtype) for _ in range(4))
    weight, bias = (torch.randn(cols, device="cuda").requires_grad_() for _ in range(2))
    x.requires_grad_()
    output, total = torchweld.ops.add_layer_norm(x, residual, (cols,), weight, bias)
    ((output * doutput).sum() + (total * dsum).sum()).backward()
    torchweld.ops.layer_norm(x.detach(), (cols,))
    wide = residual.float().requires_grad_()
    normed, stream = torchweld.ops.add_rms_norm(x, wide, (cols,), weight, dropout_p=0.25)
    ((normed * doutput).sum() + (stream * dsum).sum()).backward()
    assert wide.grad is not None and wide.grad.isfinite().all()
    for t in (output, total, x.grad, weight.grad, bias.grad):
        assert t is not None and t.isfinite().all()


def main() -> None:
    assert torchweld.backend.active("cuda") == "cuda", torchweld.backend.unavailable("cuda")
    for dtype in (torch.float32, torch.bfloat16):
        for cols in COLUMNS:
            layer_norm(cols, dtype)
    torch.cuda.synchronize()
    print("all kernels ran")


if __name__ == "__main__":
    main()
