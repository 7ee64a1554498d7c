"""Norms, activations, gated MLPs and ends of encoder blocks of Hugging Face transformers on the kernels.

What a class computes is told by its code, since most models carry copies of the same few. What a module's activation,
norm and dropout are is asked at each call, for they may be replaced or hooked.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from torchweld import ops
from torchweld._torch import has_global_hooks, has_hooks
from torchweld.integrations.hugging_face_loss import is_language_model, late_forward, why_no_loss
from torchweld.integrations.hugging_face_rotary import on_the_kernels
from torchweld.nn.twins import is_plain
from torchweld.ops._arguments import KERNEL_DTYPES
from torchweld.ops._register import under_autocast


@dataclass(frozen=True)
class Known:
    """`kind`: of swap; `methods` that do the same as those of the class; `now`: what they run on.

    `why_not`: of a module, why it stays as it is; None if it does not.
    """

    kind: str
    methods: Mapping[str, Callable[..., Any]]
    now: str
    why_not: Callable[[Any], str | None] = lambda _: None


_STOCK = "_torchweld_stock_"  # and the name of a method: that of the class, beside the one that stands for it


def _stock(module: Any, *args: Any, method: str = "forward") -> Any:
    """Calls the method that the module's own stands for. The module may be of a subclass since, as under FSDP."""
    return getattr(module, _STOCK + method)(*args)


# ---- Norms and activations


def _rms_norm(module: Any, hidden_states: Tensor) -> Tensor:
    if hidden_states.dtype != module.weight.dtype:  # each model mixes dtypes in its own way
        stock: Tensor = _stock(module, hidden_states)
        return stock
    return ops.rms_norm(hidden_states, module.weight.shape, module.weight, module.variance_epsilon)


def _gemma_norm(module: Any, x: Tensor) -> Tensor:
    return ops.rms_norm(x, module.weight.shape, module.weight, module.eps, zero_centered_weight=True)


def _gelu(module: Any, input: Tensor) -> Tensor:
    if input.dtype is torch.float32 and not (input.requires_grad and torch.is_grad_enabled()):  # torch is as fast
        stock: Tensor = _stock(module, input)
        return stock
    return ops.gelu(input)


def _gelu_tanh(module: Any, input: Tensor) -> Tensor:
    return ops.gelu(input, "tanh")


_ACTIVATIONS = {"GELUActivation": _gelu, "NewGELUActivation": _gelu_tanh, "GELUTanh": _gelu_tanh}


# ---- Gated MLPs

_GATES: dict[tuple[str, str], Callable[..., Tensor]] = {
    ("torch.nn.modules.activation", "SiLU"): ops.swiglu,
    ("transformers.activations", "SiLUActivation"): ops.swiglu,
    ("transformers.activations", "GELUActivation"): ops.geglu,
    ("transformers.activations", "NewGELUActivation"): partial(ops.geglu, approximate="tanh"),
    ("transformers.activations", "GELUTanh"): partial(ops.geglu, approximate="tanh"),
}


def _gate(activation: Any) -> Callable[..., Tensor] | None:
    """What stands for the product with an activation; None where a call of it is to be seen, or is of another."""
    if not isinstance(activation, torch.nn.Module) or has_hooks(activation) or "forward" in vars(activation):
        return None
    cls = type(activation)
    if (cls.__module__, cls.__name__) == ("torch.nn.modules.activation", "GELU"):
        return partial(ops.geglu, approximate=str(activation.approximate))
    return _GATES.get((cls.__module__, cls.__name__))


def _llama_mlp(module: Any, x: Tensor) -> Any:
    if (gate := _gate(module.act_fn)) is None:
        return _stock(module, x)
    return module.down_proj(gate(module.gate_proj(x), module.up_proj(x)))


def _phi3_mlp(module: Any, hidden_states: Tensor) -> Any:
    if (gate := _gate(module.activation_fn)) is None:
        return _stock(module, hidden_states)
    return module.down_proj(gate(module.gate_up_proj(hidden_states)))


def _t5_mlp(module: Any, hidden_states: Tensor) -> Any:
    if (gate := _gate(module.act)) is None or type(module.wo) is not torch.nn.Linear:
        return _stock(module, hidden_states)
    product = module.dropout(gate(module.wi_0(hidden_states), module.wi_1(hidden_states)))
    return module.wo(product.to(module.wo.weight.dtype))  # which may have stayed float32


def _t5_gemma_mlp(module: Any, x: Tensor) -> Any:
    if (gate := _gate(module.act_fn)) is None:
        return _stock(module, x)
    return module.down_proj(module.dropout(gate(module.gate_proj(x), module.up_proj(x))))


def _modern_bert_mlp(module: Any, hidden_states: Tensor) -> Any:
    if (gate := _gate(module.act)) is None:
        return _stock(module, hidden_states)
    return module.Wo(module.drop(gate(module.Wi(hidden_states))))


def _apply_gate(module: Any, gate_up_out: Tensor) -> Any:
    if (gate := _gate(module.act_fn)) is None:
        return _stock(module, gate_up_out, method="_apply_gate")
    return gate(gate_up_out)


# By the model and class that it is written for: the forward, and the name of its activation.
_MLPS: dict[tuple[str, str], tuple[Callable[..., Any], str]] = {
    ("llama", "LlamaMLP"): (_llama_mlp, "act_fn"),
    ("qwen2_5_vl", "Qwen2_5_VLMLP"): (_llama_mlp, "act_fn"),
    ("phi3", "Phi3MLP"): (_phi3_mlp, "activation_fn"),
    ("t5", "T5DenseGatedActDense"): (_t5_mlp, "act"),
    ("t5gemma", "T5GemmaMLP"): (_t5_gemma_mlp, "act_fn"),
    ("modernbert", "ModernBertMLP"): (_modern_bert_mlp, "act"),
}


def _no_gate(name: str, module: Any) -> str | None:
    activation = getattr(module, name, None)
    return None if _gate(activation) else f"its activation, {type(activation).__name__}, has no gated kernel, or hooks"


def _why_not_experts(module: Any) -> str | None:
    config = getattr(module, "config", None)
    if getattr(config, "_experts_implementation", "eager") in ("eager", None):
        return "its experts are called one by one"
    return _no_gate("act_fn", module)


def _gated(cls: Any) -> Known | None:
    body = _body(cls, "forward")
    for (model, name), (forward, activation) in _MLPS.items():
        if body is not None and body == _body(_class(model, name), "forward"):
            return Known("mlp", {"forward": forward}, _NOW, partial(_no_gate, activation))
    experts = getattr(cls, "_apply_gate", None)
    if experts is not None and experts is getattr(_module("integrations.moe"), "_default_apply_gate", None):
        return Known("mlp", {"_apply_gate": _apply_gate}, _NOW, _why_not_experts)
    return None


_NOW = "its gate: torchweld.ops.swiglu or geglu"


# ---- Dropout, residual add and norm at the end of a part of an encoder block

_PAYS = 1 << 16  # elements from which one pass on a CPU takes less time than two even without dropout


def _why_not_fused(module: Any) -> str | None:
    """Why the norm or the dropout must be called; None if nothing sees the call and no other module is in the place."""
    for part, kind in ((module.LayerNorm, torch.nn.LayerNorm), (module.dropout, torch.nn.Dropout)):
        if not is_plain(part, kind):
            return f"its {type(part).__name__} has hooks, or is no torch.nn.{kind.__name__}"
    return None


def _in_one_pass(x: Any, residual: Any, dropout_p: float) -> bool:
    """Whether the fused op gives what the modules give, and is not slower."""
    if not (type(x) is type(residual) is Tensor and x.shape == residual.shape and x.device == residual.device):
        return False
    dtype = torch.promote_types(x.dtype, residual.dtype)  # they differ under autocast
    if dtype not in KERNEL_DTYPES or (x.is_cuda and dtype is not torch.float32 and under_autocast(x)):
        return False
    if dropout_p > 0 or not x.is_cpu:
        return True
    return x.numel() >= _PAYS and not (dtype is torch.float32 and torch.is_grad_enabled())


def _block_end(module: Any, hidden_states: Any, input_tensor: Any) -> Any:
    x, norm, dropout = module.dense(hidden_states), module.LayerNorm, module.dropout
    plain = not has_global_hooks() and _why_not_fused(module) is None
    p = float(dropout.p) if plain and dropout.training else 0.0
    if not (plain and _in_one_pass(x, input_tensor, p)):
        return norm(dropout(x) + input_tensor)
    dtype, shape = torch.promote_types(x.dtype, input_tensor.dtype), norm.normalized_shape
    x, residual = x.to(dtype), input_tensor.to(dtype)
    return ops.add_layer_norm(x, residual, shape, norm.weight, norm.bias, norm.eps, dropout_p=p)[0]


# ---- Recognition


def _module(name: str) -> Any:
    """A module of transformers; None where this version has it not."""
    try:
        return importlib.import_module(f"transformers.{name}")
    except ImportError:
        return None


def _class(model: str, name: str) -> Any:
    return getattr(_module(f"models.{model}.modeling_{model}"), name, None)


def _body(cls: Any, *methods: str) -> tuple[Any, ...] | None:
    """What the methods do: their instructions, and the names and constants in them."""
    codes = [getattr(getattr(cls, method, None), "__code__", None) for method in methods]
    if not all(isinstance(code, CodeType) for code in codes):
        return None
    return tuple((c.co_code, c.co_names, tuple(map(repr, c.co_consts))) for c in codes if c is not None)


def _is_block_end(cls: Any) -> bool:
    """Whether a class has BERT's LayerNorm(dropout(dense(hidden_states)) + input_tensor)."""
    body = _body(cls, "forward")
    if body is None or body != _body(_class("bert", "BertSelfOutput"), "forward"):
        return False
    code = cls.forward.__code__
    attributes, arguments = ("dense", "dropout", "LayerNorm"), ("self", "hidden_states", "input_tensor")
    return (code.co_names, code.co_varnames) == (attributes, arguments)


def recognise(cls: Any) -> Known | None:
    """What stands for a class of transformers; None for one not known."""
    if (known := _known(cls)) is None:
        return None
    stock = {_STOCK + name: getattr(cls, name) for name in known.methods}
    return replace(known, methods={**known.methods, **stock})


def _known(cls: Any) -> Known | None:
    if not cls.__module__.startswith("transformers."):
        return None
    if cls.__module__ == "transformers.activations":
        forward = _ACTIVATIONS.get(cls.__name__)
        return Known("activations", {"forward": forward}, "torchweld.ops.gelu") if forward else None
    if "Norm" in cls.__name__:
        llama, t5 = _class("llama", "LlamaRMSNorm"), _class("t5", "T5LayerNorm")
        if _body(cls, "forward") in (_body(llama, "forward"), _body(t5, "forward")):
            return Known("norms", {"forward": _rms_norm}, "torchweld.ops.rms_norm")
        if _body(cls, "forward", "_norm") == _body(_class("gemma2", "Gemma2RMSNorm"), "forward", "_norm"):
            return Known("norms", {"forward": _gemma_norm}, "torchweld.ops.rms_norm")
        return None
    if found := _gated(cls):
        return found
    if _is_block_end(cls):
        now = "its dropout, residual add and norm: torchweld.ops.add_layer_norm"
        return Known("norms", {"forward": _block_end}, now, _why_not_fused)
    if is_language_model(cls):
        now = "its loss in training: torchweld.ops.linear_cross_entropy"
        return Known("loss", {"forward": late_forward(cls.forward)}, now, why_no_loss)
    if forward := on_the_kernels(cls):
        return Known("rope", {"forward": forward}, "its rotary embedding: torchweld.ops.rotary_embedding")
    return None
