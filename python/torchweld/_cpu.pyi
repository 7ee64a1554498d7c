"""CPU kernels of torchweld. `_cuda` has those that are re-exported there, with the same arguments.

All arguments are positional, and none has a default. What they must be is said where they are bound, in csrc/bindings.
"""

from torch import Tensor

_List = list[Tensor] | tuple[Tensor, ...]
_Refusals = list[tuple[int, str]]  # index in the list, reason
# bias, alibi_slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k
_Modifiers = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
# scale, softcap, left, right, bottom_right, dropout_p, max_seqlen_q, max_seqlen_k
_Options = tuple[float, float, int, int, bool, float, int, int]
_PagedOptions = tuple[float, float, int, int]  # scale, softcap, left, right
_Scalar = Tensor | None
# lr, lr_tensor, weight_decay, maximize, max_grad_norm, grad_norm, grad_scale, found_inf, zero_grads, rounding_seed and
# the table
_StepOptions = tuple[float, _Scalar, float, bool, float, _Scalar, _Scalar, _Scalar, bool, int | None, Tensor | None]

OPTIMIZER_TABLE_WORDS: int
GRAD_NORM_BLOCKS: int

# ---- Instruction sets

def isa() -> str: ...
def use_isa(name: str, /) -> None: ...
def built_isas() -> list[str]: ...
def available_isas() -> list[str]: ...

# ---- Losses and activations

def cross_entropy_forward(
    logits: Tensor, target: Tensor, ignore_index: int, smoothing: float, loss: Tensor, stats: Tensor, /
) -> None: ...
def cross_entropy_backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    smoothing: float,
    stats: Tensor,
    dlogits: Tensor,
    /,
) -> None: ...
def gelu_forward(input: Tensor, exact: bool, output: Tensor, /) -> None: ...
def gelu_backward(doutput: Tensor, input: Tensor, exact: bool, dinput: Tensor, /) -> None: ...
def gated_forward(gate: Tensor, up: Tensor, activation: str, output: Tensor, /) -> None: ...
def gated_backward(
    doutput: Tensor, gate: Tensor, up: Tensor, activation: str, dgate: Tensor, dup: Tensor, /
) -> None: ...

# ---- Rotary embeddings

def rotary_embedding(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    rotary_dim: int,
    interleaved: bool,
    inverse: bool,
    query_output: Tensor,
    key_output: Tensor | None,
    /,
) -> None: ...

# ---- Attention

Modifiers: tuple[str, ...]  # the fields of a tuple of modifiers, of options
Options: tuple[str, ...]
PagedOptions: tuple[str, ...]
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
    /,
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
    /,
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
    /,
) -> None: ...

# ---- Norms

def layer_norm_forward(
    input: Tensor,
    residual: Tensor | None,
    cols: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    weight_offset: float,
    sum: Tensor | None,
    output: Tensor,
    stats: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    workspace: Tensor | None,
    /,
) -> None: ...
def layer_norm_forward_workspace(rows: int, cols: int, device: int, /) -> int: ...
def layer_norm_workspace(rows: int, cols: int, weights: bool, device: int, /) -> int: ...
def layer_norm_backward(
    doutput: Tensor,
    dsum: Tensor | None,
    input: Tensor,
    cols: int,
    weight: Tensor | None,
    centred: bool,
    weight_offset: float,
    stats: Tensor,
    dinput: Tensor | None,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    partial: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    /,
) -> None: ...

# ---- Optimizers

def adamw_(
    params: _List,
    grads: _List,
    exp_avgs: _List,
    exp_avg_sqs: _List,
    max_exp_avg_sqs: _List,
    steps: _List,
    masters: _List,
    beta1: float,
    beta2: float,
    eps: float,
    decoupled: bool,
    options: _StepOptions,
    /,
) -> _Refusals: ...
def sgd_(
    params: _List,
    grads: _List,
    momentum_buffers: _List,
    masters: _List,
    momentum: float,
    dampening: float,
    nesterov: bool,
    first_step: bool,
    options: _StepOptions,
    /,
) -> _Refusals: ...
def grad_norm(
    grads: _List, grad_scale: Tensor | None, partial: Tensor, norm: Tensor, table: Tensor | None, /
) -> _Refusals: ...
