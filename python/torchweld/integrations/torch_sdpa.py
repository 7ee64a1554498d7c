"""The kernels of attention under torch's own function: `torch.nn.attention.activate_flash_attention_impl("torchweld")`.

After that call `F.scaled_dot_product_attention` runs on the kernels wherever torch chooses its FlashAttention: on CUDA,
and on the CPU, where FlashAttention is the default. Models need no change. `restore_flash_attention_impl()` undoes it.
torch still decides which calls reach FlashAttention: on the CPU calls without dropout, on CUDA calls without attn_mask.
torch's kernel serves what the kernels do not take (float64, a debug mask), what would not be faster (on the CPU a few
queries), and all calls inside `use_backend("reference")`. Dropout draws other bits than torch's kernel, from the same
generator.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.attention
from torch import Tensor

from torchweld import _torch, backend
from torchweld.ops._attention import Modifiers, Options, refusal, row_statistics, run_backward, run_forward, wide_output
from torchweld.reference.philox import draw_seed

NAME = "torchweld"
_MASKS = frozenset((torch.bool, torch.float32, torch.bfloat16, torch.float16))
Kernel = Callable[..., Any]


def register() -> None:
    """Registers the name "torchweld" with `activate_flash_attention_impl`, if torch has it. Changes nothing else."""
    if hasattr(torch.nn.attention, "register_flash_attention_impl") and hasattr(torch.library, "get_kernel"):
        torch.nn.attention.register_flash_attention_impl(NAME, register_fn=Activation)


class Activation:
    """torch's operators replaced, until `remove`."""

    def __init__(self) -> None:
        self._library: torch.library.Library | None = torch.library.Library("aten", "IMPL")
        replaced: list[tuple[str, str, Kernel]] = []
        replaced += [("CPU", _torch.FLASH_CPU, cpu_forward), ("CPU", _torch.FLASH_CPU_BACKWARD, cpu_backward)]
        if torch.backends.cuda.is_built():
            replaced += [("CUDA", _torch.FLASH, cuda_forward), ("CUDA", _torch.FLASH_BACKWARD, cuda_backward)]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")  # for the replaced operator
            for key, name, ours in replaced:
                operator = _or_torchs(ours, torch.library.get_kernel(f"aten::{name}", key))
                self._library.impl(name, operator, key, with_keyset=True)

    def remove(self) -> None:
        """Drops the library. The operators are torch's again when no reference to it is left."""
        self._library = None


def _or_torchs(ours: Kernel, torchs: Any) -> Kernel:
    """The operator: `ours`, and torch's kernel where `ours` returns None."""

    def operator(keys: torch.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        found = ours(*args, **kwargs)
        return torchs.call_boxed(keys, *args, **kwargs) if found is None else found

    return operator


# On the CPU torch's kernel is faster for fewer rows per key head, because it does not pack keys and values.
_FEW = {torch.float32: 64, torch.bfloat16: 2, torch.float16: 2}


def _serves(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> bool:
    if any(t.dim() != 4 or t.stride(-1) != 1 for t in (query, key, value)):
        return False
    rows = query.shape[2] * query.shape[1] // max(key.shape[1], 1)
    if query.device.type == "cpu" and rows < _FEW.get(query.dtype, 0):
        return False
    reason = refusal(query, value)
    if mask is not None and mask.dtype not in _MASKS:
        reason = f"attn_mask of dtype {mask.dtype}"
    return backend.choose("scaled_dot_product_attention", query.device, reason) != "reference"


def _arguments(
    query: Tensor, mask: Tensor | None, seed: Tensor | None, dropout_p: float, is_causal: bool, scale: float | None
) -> tuple[Modifiers, Options]:
    scale = 1.0 / math.sqrt(max(query.shape[-1], 1)) if scale is None else scale
    return Modifiers(bias=mask, seed=seed), Options(scale, right=0 if is_causal else -1, dropout_p=dropout_p)


# ---- CPU. Outputs have the strides that torch's fake kernels promise: compiled graphs rely on them.


def cpu_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor] | None:
    """(output, logsumexp) of aten::_scaled_dot_product_flash_attention_for_cpu."""
    if dropout_p > 0 or not _serves(query, key, value, attn_mask):
        return None
    statistics = row_statistics(query, 1)
    modifiers, options = _arguments(query, attn_mask, None, 0.0, is_causal, scale)
    output = run_forward(query, key, value, torch.empty_like(query), None, statistics, modifiers, options)
    lse = statistics[0]
    if attn_mask is not None:  # torch's backward needs a finite number for a row that sees no key
        lse.masked_fill_(lse == -math.inf, 0.0)
    return output, lse.transpose(1, 2).contiguous().transpose(1, 2)


def cpu_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, ...] | None:
    """Gradients of query, key and value, of aten::_scaled_dot_product_flash_attention_for_cpu_backward."""
    if dropout_p > 0 or not _serves(query, key, value, attn_mask):
        return None
    grads = [torch.empty_permuted(t.shape, (0, 2, 1, 3), dtype=t.dtype, device=t.device) for t in (query, key, value)]
    modifiers, options = _arguments(query, attn_mask, None, 0.0, is_causal, scale)
    statistics = logsumexp.contiguous().unsqueeze(0)
    if logsumexp.numel() > 0 and bool(logsumexp.abs().amax() > _LARGE):
        output, wide, statistics = torch.empty_like(query), wide_output(query), row_statistics(query, 2)
        run_forward(query, key, value, output, wide, statistics, modifiers, options)
        out = output if wide is None else wide
    run_backward(grad_out, None, out, statistics, query, key, value, grads, modifiers, options, (), True)
    return tuple(grads)


# The rounding of lse is a relative error of the weights in the backward. From here on it is more than 2^-17.
_LARGE = 256.0

# ---- CUDA


def cuda_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...] | None:
    """(output, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, rng_state, unused, debug_attn_mask)."""
    if return_debug_mask or not _serves(query, key, value):
        return None
    seed = draw_seed(query.device) if dropout_p > 0 else None
    state = torch.zeros(2, dtype=torch.int64, device=query.device)
    if seed is not None:
        state[:1] = seed
    statistics = row_statistics(query, 1)
    modifiers, options = _arguments(query, None, seed, dropout_p, is_causal, scale)
    output = run_forward(query, key, value, torch.empty_like(query), None, statistics, modifiers, options)
    unused = torch.zeros((), dtype=torch.uint64, device=query.device)
    return (
        output,
        statistics[0],
        None,
        None,
        query.shape[2],
        key.shape[2],
        state.view(torch.uint64),
        unused,
        query.new_empty(0),
    )


def cuda_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...] | None:
    """Gradients of query, key and value, of aten::_scaled_dot_product_flash_attention_backward."""
    if not _serves(query, key, value):
        return None
    seed = philox_seed.view(torch.int64)[:1] if dropout_p > 0 else None
    grads = [torch.empty_like(t) for t in (query, key, value)]
    modifiers, options = _arguments(query, None, seed, dropout_p, is_causal, scale)
    statistics = logsumexp.contiguous().unsqueeze(0)
    run_backward(grad_out, None, out, statistics, query, key, value, grads, modifiers, options, (), True)
    return tuple(grads)
