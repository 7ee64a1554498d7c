"""The attention of Hugging Face transformers on the kernels: `attn_implementation="torchweld"`."""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch
from torch import Tensor

from torchweld import ops
from torchweld.nn.stock import is_replaced
from torchweld.ops._register import under_autocast

NAME = "torchweld"


# ---- Attention


def register() -> None:
    """Registers `attn_implementation="torchweld"` and its mask with transformers. `patch` calls this too."""
    from transformers import AttentionInterface, AttentionMaskInterface  # noqa: PLC0415
    from transformers.masking_utils import sdpa_mask  # noqa: PLC0415

    AttentionInterface.register(NAME, attention_forward)
    # Without a mask function of the same name transformers would drop padding and causality in silence.
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: (B, H, N, D) to (B, N, H, D). Groups of query heads share a key head.

    The result has the weights too if `output_attentions` is set. `indices` (B, N, K) are the keys that a query may see,
    `block_indices` the blocks of keys. Models of sparse attention put these into the mask only for "sdpa" and "eager".
    Keywords that only concern the mask (sliding_window, position_ids) are ignored: the mask contains them.
    """
    if kwargs.get("sinks") is not None:
        raise ValueError(
            "[attention_forward] sinks: expected None, but got a sink for each query; set attn_implementation='eager'"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(query.shape[2] > 1 and attention_mask is None and causal)
    if indices is not None:
        attention_mask = _among(indices, attention_mask, key.shape[2])
    if block_indices is not None:
        causal = False  # the mask contains it
        attention_mask = _among_blocks(module, block_indices, attention_mask, query, key, kwargs.get("position_ids"))
    if is_replaced() and not softcap and s_aux is None:  # another function has replaced torch's, and must see the call
        from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: PLC0415

        rest = (attention_mask, dropout, scaling, is_causal, position_bias)
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, *rest, **kwargs)
        return found
    if under_autocast(query):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    bias = attention_mask
    if position_bias is not None:
        if bias is None:
            bias = position_bias
        elif bias.dtype == torch.bool:
            bias = torch.where(bias, position_bias, torch.finfo(position_bias.dtype).min)
        else:
            bias = position_bias + bias
    if bias is not None and bias.dtype not in (torch.bool, torch.float32):
        bias = bias.to(query.dtype)
    if query.shape[0] != key.shape[0]:  # learned queries have one batch for all
        query = query.expand(key.shape[0], -1, -1, -1)
    softcap = softcap or 0.0

    def attend(value: Tensor, dropout: float) -> Any:
        return ops.attention(
            query,
            key,
            value,
            causal=causal,
            softcap=softcap,
            bias=bias,
            sinks=s_aux,
            dropout_p=dropout,
            scale=scaling,
        )

    weights = None
    if kwargs.get("output_attentions"):
        weights = attend(torch.eye(key.shape[2]).to(value).expand(*value.shape[:2], -1, -1), 0.0)
    return attend(value, dropout).transpose(1, 2).contiguous(), weights


def _among(indices: Tensor, mask: Tensor | None, keys: int) -> Tensor:
    """The mask, (B, 1, N, keys), which also hides the keys that are not in `indices`."""
    chosen = torch.zeros(*indices.shape[:2], keys, dtype=torch.bool, device=indices.device)
    chosen = chosen.scatter(-1, indices.long(), True).unsqueeze(1)
    if mask is None or mask.dtype == torch.bool:
        return chosen if mask is None else mask & chosen
    return mask.masked_fill(~chosen, torch.finfo(mask.dtype).min)


def _among_blocks(
    module: Any, blocks: Tensor, mask: Tensor | None, query: Tensor, key: Tensor, positions: Tensor | None
) -> Tensor:
    """The mask that the model's own indexer makes from its blocks of keys."""
    rows, keys = query.shape[2], key.shape[2]
    if positions is None:
        positions = torch.arange(keys - rows, keys, device=query.device)
    positions = positions.expand(query.shape[0], rows)
    made: Tensor = module.indexer.build_block_mask(blocks, mask, keys, query.dtype, query.device, positions)
    return made


class AttentionChange:
    """A change by `set_attn_implementation`. Its undo restores the value of each of the model's configs."""

    def __init__(self, model: Any) -> None:
        register()
        self.model, self.before = ref(model), _implementations(model.config)
        try:
            model.set_attn_implementation(_Name(NAME))
        except Exception:
            model.set_attn_implementation(self.before)
            raise

    def undo(self) -> str | None:
        model = self.model()
        if model is None:
            return "it was deleted since"
        now = model.config._attn_implementation
        if now != NAME:
            return f"its attention was set to {now!r} since"
        model.set_attn_implementation(self.before)
        return None


class _Name(str):
    """The name in a model's config. A process that unpickles it registers the attention."""

    __slots__ = ()

    def __reduce__(self) -> Any:
        return _registered_name, ()


def _registered_name() -> str:
    register()
    return _Name(NAME)


def _implementations(config: Any) -> Any:
    """The argument of `set_attn_implementation` that restores a config and the configs inside it.

    Configs that already have "torchweld" are left out: another patch undoes them.
    """
    now = config._attn_implementation
    found = {"": now} if now != NAME else {}
    for key in config.sub_configs:
        sub = getattr(config, key, None)
        if sub is not None and (inner := _implementations(sub)):
            found[key] = inner
    return now if list(found) == [""] else found


def attention_of(model: torch.nn.Module) -> tuple[str, str | None] | None:
    """The attention of a model and, if it cannot be changed, the reason. None if the model is not of transformers."""
    from transformers.modeling_utils import PreTrainedModel  # noqa: PLC0415

    if not isinstance(model, PreTrainedModel):
        return None
    now = model.config._attn_implementation
    if now == NAME:
        return f"{now} attention", "already torchweld's"
    if not model._can_set_attn_implementation():
        return f"{now} attention", "its attention does not go through AttentionInterface"
    if not (model._supports_sdpa or model._supports_attention_backend):
        return f"{now} attention", "it does not say that its attention may be replaced"
    return f"{now} attention", None
