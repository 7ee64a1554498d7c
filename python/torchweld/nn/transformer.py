"""torch.nn's Transformer on the fused attention, with dropout, residual add and norm in one pass."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from torchweld import ops
from torchweld._torch import has_global_hooks
from torchweld.nn.twins import adopt, is_plain, traceable, twin

Modules = tuple[torch.nn.Module, ...]


def _fusable(layer: torch.nn.Module, base: type[torch.nn.Module], norms: Modules, dropouts: Modules) -> bool:
    """Whether nothing needs the calls of these modules: no hook, no module of another class, no block of a subclass."""
    blocks = (name for name in base.__dict__ if name.endswith("_block"))
    return (
        all(is_plain(norm, torch.nn.LayerNorm) for norm in norms)
        and all(is_plain(dropout, torch.nn.Dropout) for dropout in dropouts)
        and all(getattr(type(layer), block) is getattr(base, block) for block in blocks)
        and not has_global_hooks()
    )


def _attend(attention: Any, x: Tensor, memory: Tensor, *masks: Any) -> Tensor:
    mask, padding, causal = masks
    return attention(x, memory, memory, attn_mask=mask, key_padding_mask=padding, need_weights=False, is_causal=causal)[
        0
    ]


def _add_norm(x: Tensor, residual: Tensor, dropout: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """norm(residual + dropout(x)), and that sum."""
    dtype = torch.promote_types(x.dtype, residual.dtype)  # they differ under autocast
    shape, p = norm.normalized_shape, dropout.p if dropout.training else 0.0
    return ops.add_layer_norm(x.to(dtype), residual.to(dtype), shape, norm.weight, norm.bias, norm.eps, dropout_p=p)


def _feed_forward(layer: Any, x: Tensor) -> Tensor:
    x, activation = layer.linear1(x), layer.activation
    if type(activation) is torch.nn.GELU and is_plain(activation, torch.nn.GELU):
        x = ops.gelu(x, activation.approximate)
    else:
        x = activation(x)
    return layer.linear2(layer.dropout(x))


@twin
class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """Drop-in for `torch.nn.TransformerEncoderLayer`: same arguments, same parameters, same state_dict.

    Three things turn the fusion off: a hook on a norm or on the dropout in front of a residual add, a module of another
    class in its place, and a subclass with its own block. Nested tensors go to torch's inference path.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        adopt((self.self_attn, self.norm1, self.norm2, self.dropout, self.dropout1, self.dropout2))

    @traceable
    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        norms, dropouts = (self.norm1, self.norm2), (self.dropout1, self.dropout2)
        masks = src_mask, src_key_padding_mask, is_causal
        # A hook on the attention, or an attention of another class, gets additive masks, as from torch's layer.
        watched = masks[:2] != (None, None) and not is_plain(self.self_attn, torch.nn.MultiheadAttention)
        if src.is_nested or watched or not _fusable(self, torch.nn.TransformerEncoderLayer, norms, dropouts):
            return super().forward(src, *masks)
        if self.norm_first:
            x = self.norm1(src)
            x, total = _add_norm(_attend(self.self_attn, x, x, *masks), src, self.dropout1, self.norm2)
            return total + self.dropout2(_feed_forward(self, x))
        x = _add_norm(_attend(self.self_attn, src, src, *masks), src, self.dropout1, self.norm1)[0]
        return _add_norm(_feed_forward(self, x), x, self.dropout2, self.norm2)[0]


@twin
class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """Drop-in for `torch.nn.TransformerDecoderLayer`; fused under the conditions of `TransformerEncoderLayer`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        adopt((self.self_attn, self.multihead_attn, self.norm1, self.norm2, self.norm3))
        adopt((self.dropout, self.dropout1, self.dropout2, self.dropout3))

    @traceable
    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        norms, dropouts = (self.norm1, self.norm2, self.norm3), (self.dropout1, self.dropout2, self.dropout3)
        if not _fusable(self, torch.nn.TransformerDecoderLayer, norms, dropouts):
            return super().forward(
                tgt,
                memory,
                tgt_mask,
                memory_mask,
                tgt_key_padding_mask,
                memory_key_padding_mask,
                tgt_is_causal,
                memory_is_causal,
            )
        masks = tgt_mask, tgt_key_padding_mask, tgt_is_causal
        memory_masks = memory_mask, memory_key_padding_mask, memory_is_causal
        if self.norm_first:
            x = self.norm1(tgt)
            x, total = _add_norm(_attend(self.self_attn, x, x, *masks), tgt, self.dropout1, self.norm2)
            x = _attend(self.multihead_attn, x, memory, *memory_masks)
            x, total = _add_norm(x, total, self.dropout2, self.norm3)
            return total + self.dropout3(_feed_forward(self, x))
        x = _add_norm(_attend(self.self_attn, tgt, tgt, *masks), tgt, self.dropout1, self.norm1)[0]
        x = _add_norm(_attend(self.multihead_attn, x, memory, *memory_masks), x, self.dropout2, self.norm2)[0]
        return _add_norm(_feed_forward(self, x), x, self.dropout3, self.norm3)[0]


@twin
class TransformerEncoder(torch.nn.TransformerEncoder):
    """Drop-in for `torch.nn.TransformerEncoder`; its copies of `encoder_layer` are drop-ins too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        adopt(self.layers.modules())

    forward = traceable(torch.nn.TransformerEncoder.forward)


@twin
class TransformerDecoder(torch.nn.TransformerDecoder):
    """Drop-in for `torch.nn.TransformerDecoder`; its copies of `decoder_layer` are drop-ins too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        adopt(self.layers.modules())

    forward = traceable(torch.nn.TransformerDecoder.forward)


@twin
class Transformer(torch.nn.Transformer):
    """Drop-in for `torch.nn.Transformer`; an encoder or decoder that the caller gives is used as it is."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        given = inspect.signature(torch.nn.Transformer).bind(*args, **kwargs).arguments
        for part in ("encoder", "decoder"):
            if given.get(f"custom_{part}") is None:
                adopt(getattr(self, part).modules())

    forward = traceable(torch.nn.Transformer.forward)
