"""torch.nn.MultiheadAttention on the fused attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torchweld import ops


class MultiheadAttention(torch.nn.MultiheadAttention):
    """Drop-in for `torch.nn.MultiheadAttention`: same arguments, same parameters, same state_dict.

    The fused attention serves `need_weights=False`. Asking for the weights means that all of them have to be in
    memory, and that torch's own forward makes them. Masks follow torch's module: True (or -inf) means ignore.
    """

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
        if need_weights or query.is_nested or key.is_nested or value.is_nested:
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
        batched = F._mha_shape_check(  # type: ignore[attr-defined]
            query, key, value, key_padding_mask, attn_mask, self.num_heads
        )
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")

        # (B, L, E), whatever the caller's layout; one tensor given three times stays one.
        def batch_first(x: Tensor) -> Tensor:
            return x.unsqueeze(0) if not batched else x if self.batch_first else x.transpose(0, 1)

        same = query is key and key is value
        query = batch_first(query)
        key, value = (query, query) if same else (batch_first(key), batch_first(value))
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)

        q, k, v = self._project(query, key, value, same)
        mask = self._attend(attn_mask, key_padding_mask, q, k, is_causal and key_padding_mask is None)
        out = ops.scaled_dot_product_attention(
            q, k, v, mask, self.dropout if self.training else 0.0, is_causal and key_padding_mask is None
        )
        out = F.linear(out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        return out.squeeze(0) if not batched else out if self.batch_first else out.transpose(0, 1), None

    def _project(self, query: Tensor, key: Tensor, value: Tensor, same: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, E) inputs to (B, H, L, D) heads, as views of the projections."""
        if self._qkv_same_embed_dim and same:
            projected = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            weights = (
                self.in_proj_weight.chunk(3)
                if self._qkv_same_embed_dim
                else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            )
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            projected = tuple(map(F.linear, (query, key, value), weights, biases))
        q, k, v = projected
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
            return None  # the caller's word that attn_mask is the causal mask; the kernel knows that one
        if attn_mask is not None:
            attn_mask = attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, self.num_heads))
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask[:, None, None, :]
        # bias_k and the zero key stand behind the given keys and are never masked.
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
