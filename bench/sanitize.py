"""Every CUDA kernel once along each of its code paths, on small inputs; bench/gpu.sh runs it under the sanitizer.

    python bench/sanitize.py [--families norm attention ...] [--dtypes bfloat16] [--dims 64 128]

A sanitizer makes each kernel many times slower: the options leave out what a tool would not come to.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch

import torchweld

# Columns by code path: tests/layer_norm_cases.py says which.
COLUMNS = (1, 8, 64, 255, 257, 768, 1280, 2049, 2056, 8193, 16392)


def layer_norm(cols: int, dtype: torch.dtype) -> None:
    x, residual, doutput, dsum = (torch.randn(9, cols).to(dtype) for _ in range(4))
    weight, bias = (torch.randn(cols).requires_grad_() for _ in range(2))
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


def attention(dim: int, dtype: torch.dtype) -> None:
    q, k, v, doutput = (torch.randn(1, 2, 70, dim).to(dtype).requires_grad_() for _ in range(4))
    bias = torch.randn(1, 2, 70, 70).to(dtype).requires_grad_()
    slopes, sinks = (torch.rand(2).requires_grad_() for _ in range(2))
    starts = torch.tensor([0, 33, 70], dtype=torch.int32)
    for modifiers in (
        {},
        {"causal": True, "window": (20, None), "softcap": 5.0, "bias": bias},
        {"alibi_slopes": slopes, "sinks": sinks, "dropout_p": 0.25},
        {"deterministic": False},  # dquery by atomics
        {"deterministic": False, "dropout_p": 0.25},
    ):
        output = torchweld.ops.attention(q, k, v, **modifiers)
        output.backward(doutput.detach())
    rows = (t.detach()[0].transpose(0, 1) for t in (q, k, v))
    packed = torchweld.ops.attention(*rows, causal=True, cu_seqlens_q=starts, cu_seqlens_k=starts)
    decoded = torchweld.ops.attention(q.detach()[:, :, :1], k.detach(), v.detach())
    long_key, long_value = (t.detach().repeat(1, 1, 10, 1) for t in (k, v))  # in three splits
    split = torchweld.ops.attention(q.detach()[:, :, :1], long_key, long_value)
    cache = (t.detach().transpose(1, 2).reshape(10, 7, 2, dim) for t in (k, v))
    table, lengths = torch.arange(10, dtype=torch.int32).view(1, 10), starts[1:2]
    paged = torchweld.ops.paged_attention(q.detach()[:, :, :1], *cache, table, lengths)
    for t in (output, packed, decoded, split, paged, q.grad, k.grad, v.grad, bias.grad, slopes.grad, sinks.grad):
        assert t is not None and t.isfinite().all()


def optimizers(dtype: torch.dtype) -> None:
    common = ({}, {"max_grad_norm": 1.0, "zero_grads": True}, {"master_weights": True})
    own = {
        torchweld.optim.AdamW: ({"amsgrad": True}, {"stochastic_rounding": True}),
        torchweld.optim.SGD: ({"momentum": 0.9},),
    }
    for kind, more in own.items():
        for options in (*common, *more):
            params = [torch.randn(n).to(dtype).requires_grad_() for n in (1, 7, 16385)]
            for p in params:
                p.grad = torch.randn_like(p)
            kind(params, lr=0.1, **options).step()
            assert all(p.isfinite().all() for p in params)


def elementwise(dtype: torch.dtype) -> None:
    """Vectors, single elements, and rows of a packed tensor that begin at either."""
    for cols in (1, 37, 64, 8200):
        x, up, doutput = (torch.randn(9, cols).to(dtype).requires_grad_() for _ in range(3))
        packed = torch.cat((x, up), 1).detach().requires_grad_()
        target = torch.randint(cols, (9,))
        for approximate in ("none", "tanh"):
            torchweld.ops.gelu(x, approximate).backward(doutput.detach())
            torchweld.ops.geglu(x, up, approximate=approximate).backward(doutput.detach())
        torchweld.ops.swiglu(packed).backward(doutput.detach())
        torchweld.ops.cross_entropy(x, target, label_smoothing=0.1).backward()
        torchweld.ops.linear_cross_entropy(doutput, up, target % 9).backward()
        assert all(t.grad is not None and t.grad.isfinite().all() for t in (x, up, packed, doutput))
    for dim, rotary_dim in ((64, 64), (80, 32), (12, 6)):
        query, key = (torch.randn(2, heads, 33, dim).to(dtype).requires_grad_() for heads in (6, 2))
        angles = torch.randn(1000, rotary_dim)
        ids = torch.randint(1000, (2, 33))
        for interleaved in (False, True):
            options = {"position_ids": ids, "interleaved": interleaved, "rotary_dim": rotary_dim}
            turned = torchweld.ops.rotary_embedding(query, key, angles.cos(), angles.sin(), **options)
            (turned[0].sum() + turned[1].sum()).backward()
            torchweld.ops.rotary_embedding(query.detach(), key.detach(), inplace=True, **options)
        assert all(t.grad is not None and t.grad.isfinite().all() for t in (query, key))


def families(dtype: torch.dtype, dims: list[int]) -> dict[str, list[Callable[[], None]]]:
    return {
        "attention": [partial(attention, dim, dtype) for dim in dims],
        "norm": [partial(layer_norm, cols, dtype) for cols in COLUMNS],
        "optimizer": [partial(optimizers, dtype)],
        "elementwise": [partial(elementwise, dtype)],
    }


def main(arguments: list[str] | None = None) -> None:
    names = list(families(torch.float32, []))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--families", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], help="default: %(default)s")
    parser.add_argument("--dims", nargs="+", type=int, default=[64, 128, 256, 32], help="default: %(default)s")
    options = parser.parse_args(arguments)
    assert torchweld.backend.active(options.device) == options.device, torchweld.backend.unavailable(options.device)
    torch.set_default_device(options.device)
    for dtype in (getattr(torch, name) for name in options.dtypes):
        for name, calls in families(dtype, options.dims).items():
            for call in calls if name in options.families else ():
                call()
            if name in options.families:
                if options.device == "cuda":
                    torch.cuda.synchronize()
                print(f"{name}, {str(dtype).removeprefix('torch.')}: ran", flush=True)


if __name__ == "__main__":
    main()
