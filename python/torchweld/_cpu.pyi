"""CPU kernels of torchweld. `_cuda` has those that are re-exported there, with the same arguments.

Arguments are given by position or by name, and none has a default. What they must be is said where they are bound, in
csrc/bindings.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from torchweld.ops._attention import Modifiers as _Modifiers
from torchweld.ops._attention import Options as _Options
from torchweld.ops._linear_cross_entropy import LossOptions as _LossOptions
from torchweld.ops._norm import Norm as _Norm
from torchweld.ops._optimizer import Step as _Step
from torchweld.ops._rotary import Rotation as _Rotation
from torchweld.ops._rotary import Tables as _Tables
from torchweld.ops.adamw import AdamWLists as _AdamWLists
from torchweld.ops.adamw import AdamWOptions as _AdamWOptions
from torchweld.ops.paged_attention import PagedOptions as _PagedOptions
from torchweld.ops.sgd import SgdLists as _SgdLists
from torchweld.ops.sgd import SgdOptions as _SgdOptions

_List = list[Tensor] | tuple[Tensor, ...]
_Refusals = list[tuple[int, str]]  # index in the list, reason

OPTIMIZER_TABLE_WORDS: int
GRAD_NORM_BLOCKS: int

# ---- Records: the names of their fields

AdamWLists: tuple[str, ...]
AdamWOptions: tuple[str, ...]
LossOptions: tuple[str, ...]
Modifiers: tuple[str, ...]
Norm: tuple[str, ...]
Options: tuple[str, ...]
PagedOptions: tuple[str, ...]
Rotation: tuple[str, ...]
SgdLists: tuple[str, ...]
SgdOptions: tuple[str, ...]
Step: tuple[str, ...]
Tables: tuple[str, ...]

# ---- Instruction sets

def isa() -> str: ...
def use_isa(name: str) -> None: ...
def built_isas() -> list[str]: ...
def available_isas() -> list[str]: ...

# ---- Losses and activations

def cross_entropy_forward(
    logits: Tensor, target: Tensor, ignore_index: int, smoothing: float, loss: Tensor, stats: Tensor
) -> None: ...
def cross_entropy_backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    smoothing: float,
    stats: Tensor,
    dlogits: Tensor,
) -> None: ...
def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    options: _LossOptions,
    dloss: Tensor | None,
    loss: Tensor,
    dinput: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> None: ...
def dropout(input: Tensor, seed: Tensor, p: float, output: Tensor) -> None: ...
def gelu_forward(input: Tensor, exact: bool, output: Tensor) -> None: ...
def gelu_backward(doutput: Tensor, input: Tensor, exact: bool, dinput: Tensor) -> None: ...
def gated_forward(gate: Tensor, up: Tensor, activation: str, output: Tensor) -> None: ...
def gated_backward(doutput: Tensor, gate: Tensor, up: Tensor, activation: str, dgate: Tensor, dup: Tensor) -> None: ...

# ---- Rotary embeddings

def rotary_embedding(
    query: Tensor,
    key: Tensor | None,
    tables: _Tables,
    rotation: _Rotation,
    query_output: Tensor,
    key_output: Tensor | None,
) -> None: ...

# ---- Attention

leaves_wide_output: bool

def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    modifiers: _Modifiers,
    options: _Options,
    output: Tensor,
    wide_output: Tensor | None,
    statistics: Tensor | None,
) -> None: ...
def attention_backward(
    doutput: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    modifiers: _Modifiers,
    options: _Options,
    output: Tensor,
    statistics: Tensor,
    dquery: Tensor | None,
    dkey: Tensor | None,
    dvalue: Tensor | None,
    dbias: Tensor | None,
    dalibi_slopes: Tensor | None,
    dsinks: Tensor | None,
    deterministic: bool,
) -> None: ...
def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    options: _PagedOptions,
    output: Tensor,
    lse: Tensor | None,
) -> None: ...

# ---- Norms

def layer_norm_forward(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    norm: _Norm,
    sum: Tensor | None,
    output: Tensor,
    stats: Tensor | None,
    workspace: Tensor | None,
) -> None: ...
def layer_norm_forward_workspace(rows: int, cols: int, device: int) -> int: ...
def layer_norm_workspace(rows: int, cols: int, weights: bool, device: int) -> int: ...
def layer_norm_backward(
    doutput: Tensor,
    dsum: Tensor | None,
    input: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    seed: Tensor | None,
    norm: _Norm,
    dinput: Tensor | None,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    partial: Tensor | None,
) -> None: ...

# ---- Optimizers

def adamw_(lists: _AdamWLists, options: _AdamWOptions, step: _Step, table: Tensor | None) -> _Refusals: ...
def sgd_(lists: _SgdLists, options: _SgdOptions, step: _Step, table: Tensor | None) -> _Refusals: ...
def grad_norm(
    grads: _List, grad_scale: Tensor | None, partial: Tensor, norm: Tensor, table: Tensor | None
) -> _Refusals: ...

# ---- Whole calls: the output; True where autograd must record the call; None where the call is not a common one

def allow_whole_calls(watchers: object, forward_mode: object, kernels: object, settings: object) -> None: ...
def whole_attention(
    query: object,
    key: object,
    value: object,
    attn_mask: object,
    dropout_p: object,
    is_causal: object,
    scale: object,
    enable_gqa: object,
    heads_like: object,
) -> Tensor | bool | None: ...
def whole_cross_entropy(
    input: object, target: object, ignore_index: object, reduction: object, label_smoothing: object
) -> Tensor | bool | None: ...
def whole_gelu(input: object, approximate: object) -> Tensor | bool | None: ...
def whole_layer_norm(
    input: object, normalized_shape: object, weight: object, bias: object, eps: object
) -> Tensor | bool | None: ...
def whole_rms_norm(input: object, normalized_shape: object, weight: object, eps: object) -> Tensor | bool | None: ...

# ---- A whole step of an optimizer: what it has written to; None where the step is not a common one

def whole_adamw_step(groups: object, state: object, defaults: object) -> list[Tensor] | None: ...
def whole_sgd_step(groups: object, state: object, defaults: object) -> list[Tensor] | None: ...

# ---- Nodes of autograd: the output of a forward, the gradients of its arguments of a backward

def method(function: Callable[..., Any]) -> Callable[..., Any]: ...
def node_attention_backward(ctx: object, doutput: object) -> tuple[Tensor | None, ...]: ...
def node_attention_forward(
    ctx: object, numbers: object, query: object, key: object, value: object, bias: object
) -> Tensor: ...
def node_cross_entropy_backward(ctx: object, dloss: object) -> tuple[Tensor | None, ...]: ...
def node_cross_entropy_forward(
    ctx: object,
    logits: object,
    target: object,
    ignore_index: object,
    smoothing: object,
    reduction: object,
    dtype: object,
) -> Tensor: ...
def node_gelu_backward(ctx: object, doutput: object) -> tuple[Tensor | None, ...]: ...
def node_gelu_forward(ctx: object, input: object, exact: object) -> Tensor: ...
def node_layer_norm_backward(ctx: object, doutput: object) -> tuple[Tensor | None, ...]: ...
def node_layer_norm_forward(ctx: object, input: object, weight: object, bias: object, norm: object) -> Tensor: ...
