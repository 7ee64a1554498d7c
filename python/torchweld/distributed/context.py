"""context_parallel: the attention of a model runs over sequences that are spread over devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from torchweld import ops
from torchweld._torch import no_torch_function, without_dynamo
from torchweld.distributed.attention import all_to_all_attention, ring_attention
from torchweld.distributed.rules import attention_on_parts
from torchweld.distributed.sequence import Spread
from torchweld.ops._attention_checks import fail
from torchweld.ops._register import compiled_attention

_METHODS: dict[str, Callable[..., Any]] = {"ring": ring_attention, "all_to_all": all_to_all_attention}
_TORCH_SDPA = F.scaled_dot_product_attention
_SDPA = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


class _ContextParallel(TorchFunctionMode):
    """Sends calls of attention to `method`."""

    calls_torchweld = True  # as those of patch(): torchweld's functions may come here under their own names

    def __init__(self, method: Callable[..., Any], mesh: Any, order: str) -> None:
        super().__init__()
        self.method, self.mesh, self.order = method, mesh, order

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is _TORCH_SDPA or func is ops.scaled_dot_product_attention:
            return self._sdpa(**dict(zip(_SDPA, args, strict=False)), **given)
        if func is ops.attention:
            return self._attention(*args, **given)
        return func(*args, **given)

    def _sdpa(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        op = "scaled_dot_product_attention"
        if query.dim() != 4:
            fail(op, "query", "[batch, heads, rows, head size] in context_parallel", list(query.shape))
        if not enable_gqa and key.shape[1] != query.shape[1]:
            fail(op, "key", f"query's {query.shape[1]} heads", key.shape[1], "or set enable_gqa=True")
        mask = {} if attn_mask is None else {"bias": attn_mask}
        return self._run(query, key, value, mask, causal=is_causal, dropout_p=dropout_p, scale=scale)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Any:
        given.pop("causal_align", None)  # a sequence attends to itself, so both are one
        for name in ("max_seqlen_q", "max_seqlen_k"):
            given.pop(name, None)
        bounds, other = given.pop("cu_seqlens_q", None), given.pop("cu_seqlens_k", None)
        if bounds is not other and (bounds is None or other is None or not torch.equal(bounds, other)):
            fail("attention", "cu_seqlens_k", "cu_seqlens_q itself in context_parallel", "another tensor")
        bias = given.pop("bias", None)
        return self._run(query, key, value, {} if bias is None else {"bias": bias}, cu_seqlens=bounds, **given)

    def compiled(self, func: Any, *args: Any, **given: Any) -> Any:
        """A call in a compiled function, whose graph ends there: messages are not compiled."""
        return self.__torch_function__(func, (), args, given)

    @without_dynamo
    def _run(self, query: Tensor, key: Tensor, value: Tensor, bias: dict[str, Tensor], **given: Any) -> Any:
        if bias and self.method is all_to_all_attention:
            fail("all_to_all_attention", "bias", "None", "a tensor", "use context_parallel(mesh, method='ring')")
        with no_torch_function():
            if any(isinstance(t, DTensor) for t in (query, key, value)):  # heads or batch on other dimensions of a mesh
                return attention_on_parts(self._method, {"query": query, "key": key, "value": value, **bias, **given})
            return self._method(query, key, value, **bias, **given)

    def _method(self, query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Any:
        return self.method(query, key, value, self.mesh, order=self.order, **given)


@contextmanager
def context_parallel(mesh: DeviceMesh | Any = None, *, method: str = "ring", order: str = "zigzag") -> Iterator[None]:
    """Inside, attention runs over sequences of which each process has a part, as `shard_sequence` cuts them.

    with torchweld.distributed.context_parallel(mesh):
        loss = model(shard_sequence(tokens, mesh), positions=sequence_positions(...))

    torch's and torchweld's scaled_dot_product_attention and torchweld.ops.attention then mean the whole sequence: each
    call is one of `ring_attention`, or of `all_to_all_attention`. Everything else sees the tokens of its process, and
    positions must be those of `sequence_positions`. A mask has this process's rows and all columns. The backward may
    run outside.

    Args:
        mesh: of one dimension, or a process group; None: all processes.
        method: "ring" or "all_to_all".
        order: "zigzag" or "contiguous", as in `shard_sequence`.

    Raises:
        RuntimeError: the mesh has several dimensions, or there are no processes.
        ValueError: a method or order that does not exist.
    """
    if method not in _METHODS:
        raise ValueError(f"[context_parallel] method: expected 'ring' or 'all_to_all', but got {method!r}")
    Spread.over("context_parallel", mesh, order)
    mode = _ContextParallel(_METHODS[method], mesh, order)
    compiled_attention.append(mode.compiled)
    try:
        with mode:
            yield
    finally:
        compiled_attention.pop()
