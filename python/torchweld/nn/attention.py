"""torch.nn.MultiheadAttention on the fused attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torchweld import ops
from torchweld.nn.stock import is_replaced
from torchweld.nn.twins import traceable, twin
from torchweld.ops._arguments import recordable


def _is_mask(t: object) -> bool:
    return isinstance(t, Tensor) and (t.dtype == torch.bool or t.is_floating_point())


@twin
class MultiheadAttention(torch.nn.MultiheadAttention):
    """Drop-in for `torch.nn.MultiheadAttention`: same arguments, same parameters, same state_dict.

    The fused attention serves `need_weights=False`. With `need_weights=True` torch's own forward runs, because the
    weights must then be in memory. Masks are as in torch's module: True (or -inf) hides a key.
    """

    @traceable
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        batched = query.dim() == 3
        if need_weights or not self._serves(query, key, value, key_padding_mask, attn_mask, is_causal):
            return super().forward(
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                need_weights=need_weights,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )

        # (B, L, E) in both layouts of the caller. One tensor that is given several times stays one tensor.
        def batch_first(x: Tensor) -> Tensor:
            x = recordable(x)  # torch's projections copy such an input too
            return x.unsqueeze(0) if not batched else x if self.batch_first else x.transpose(0, 1)

        distinct = {id(x): batch_first(x) for x in (query, key, value)}
        query, key, value = (distinct[id(x)] for x in (query, key, value))
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)

        q, k, v = self._project(query, key, value)
        causal = is_causal and key_padding_mask is None
        mask = self._attend(attn_mask, key_padding_mask, q, k, causal)
        out = ops.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0, causal)
        out = F.linear(out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        return out.squeeze(0) if not batched else out if self.batch_first else out.transpose(0, 1), None

    def _serves(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> bool:
        """Whether the arguments fit. If they do not, torch's own forward raises its own error."""
        if is_replaced() or query.is_nested or key.is_nested or value.is_nested:
            return False
        if not 2 <= query.dim() == key.dim() == value.dim() <= 3:
            return False
        lengths = [x.shape[-2] if x.dim() == 2 or self.batch_first else x.shape[0] for x in (query, key, value)]
        batches = [1 if x.dim() == 2 else x.shape[0 if self.batch_first else 1] for x in (query, key, value)]
        shapes = ((lengths[0], lengths[1]), (batches[0] * self.num_heads, lengths[0], lengths[1]))
        padding = (batches[0], lengths[1])[query.dim() == 2 :]
        return (
            lengths[1] == lengths[2]
            and batches[0] == batches[1] == batches[2]
            and (query.shape[-1], key.shape[-1], value.shape[-1]) == (self.embed_dim, self.kdim, self.vdim)
            and (attn_mask is not None or not is_causal)
            and (attn_mask is None or (_is_mask(attn_mask) and tuple(attn_mask.shape) in shapes))
            and (key_padding_mask is None or (_is_mask(key_padding_mask) and key_padding_mask.shape == padding))
        )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, E) inputs to (B, H, L, D) heads, as views of the projections: one product for each distinct input."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is not None and key is value:
            if query is key:
                q, k, v = F.linear(query, weight, bias).chunk(3, dim=-1)
            else:
                weights = weight.split((self.embed_dim, 2 * self.embed_dim))
                biases = (None, None) if bias is None else bias.split((self.embed_dim, 2 * self.embed_dim))
                q = F.linear(query, weights[0], biases[0])
                k, v = F.linear(key, weights[1], biases[1]).chunk(2, dim=-1)
        else:
            weights = (
                weight.chunk(3) if weight is not None else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            )
            q, k, v = map(F.linear, (query, key, value), weights, (None,) * 3 if bias is None else bias.chunk(3))
        batch = q.shape[0]
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(batch, 1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.expand(batch, 1, -1)], dim=1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        q, k, v = (x.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        return q, k, v

    def _attend(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor, causal: bool
    ) -> Tensor | None:
        """Both masks as one for scaled_dot_product_attention: boolean (True attends) if both are, else additive."""
        if causal:
            return None  # the caller says that attn_mask is the causal mask, which the kernel makes itself
        if attn_mask is not None:
            attn_mask = attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, self.num_heads))
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask[:, None, None, :]
        # bias_k and the zero key follow the given keys. No mask hides them.
        masks = [F.pad(m, (0, k.shape[-2] - m.shape[-1])) for m in (attn_mask, key_padding_mask) if m is not None]
        if not masks:
            return None
        if all(m.dtype == torch.bool for m in masks):
            return ~(masks[0] | masks[1]) if len(masks) == 2 else ~masks[0]
        additive = [
            torch.zeros_like(m, dtype=q.dtype).masked_fill_(m, float("-inf"))
            if m.dtype == torch.bool
            else m.to(q.dtype)
            for m in masks
        ]
        return additive[0] + additive[1] if len(masks) == 2 else additive[0]
