"""Tensor and sequence parallel: the layers of a model spread over devices, by torch's parallelize_module.

Of a pair of linear layers the first is cut along its outputs (heads, hidden units), the second along its inputs, and
one sum follows. With `sequence` what lies between the pairs (norms, residual adds, dropout) is cut along the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from torchweld.distributed import linear_pairs
from torchweld.distributed.whole import ORDER, Order
from torchweld.ops._attention_checks import fail

_OP = "tensor_parallel"
HEADS = ("n_head", "num_attention_heads", "encoder_attention_heads", "decoder_attention_heads")  # of a config
_KEPT: dict[str, Any] = {"use_local_output": False}


def tensor_parallel(model: nn.Module, mesh: DeviceMesh, *, sequence: bool = True) -> nn.Module:
    """Spreads a model over the devices of `mesh`, in place.

    Every process must have the same weights, see the same input, and draw the same random numbers. `full_parameter`
    and `local_parameter` lead from a parameter to the whole one and back.

    - A GPT2, GPT3, BERT (with any of its heads), Seq2Seq, ViT or AST of torchweld.models has its heads and hidden units
      spread, and those of them that read words their vocabulary. What lies between the layers is a DTensor. Losses and
      logits over a vocabulary are DTensors too, but for the losses of a BERT.
    - A model of transformers has the heads and hidden units spread of those attentions and MLPs whose linear layers
      `torchweld.distributed.linear_pairs.PAIRS` names, as in Llama, Qwen, Mistral, BERT, RoBERTa, ViT, BART and T5. It
      sees plain tensors between them, and `torchweld.patch` may come before or after.

    Args:
        mesh: of one dimension.
        sequence: also cut the stream between the layers along the tokens. All models of torchweld.models allow this; a
            model of transformers does not, and is spread without.

    Returns:
        The model itself.

    Raises:
        RuntimeError: heads that do not divide, a mesh of several dimensions, or a model without a plan.
    """
    if mesh.ndim != 1:
        fail(_OP, "mesh", "one dimension, over which layers are spread", mesh.ndim, "take one of them, mesh['name']")
    if any(isinstance(p, DTensor) for p in model.parameters()):
        fail(_OP, "model", "one whose parameters are plain tensors", "DTensors", "spread a model once")
    of: Any = model
    for name in HEADS:
        heads = getattr(getattr(model, "config", None), name, None)
        if isinstance(heads, int) and heads % mesh.size():
            fail(_OP, "mesh", f"a number of devices that divides the model's {heads} heads", mesh.size())
    if _has(model, "wte", "h"):
        _gpt(of, mesh, sequence)
    elif _has(model, "shared", "encoder.layers", "decoder.layers", "encoder.layernorm_embedding") and hasattr(
        of, "ops"
    ):
        _seq2seq(of, mesh, sequence)
    elif _has(model, "bert.embeddings.norm", "bert.layers"):
        _bert(of.bert, mesh, sequence)
        _words(of, mesh)
    elif _has(model, "embeddings.norm", "layers"):
        _bert(of, mesh, sequence)
    elif _has(model, "embed", "layers", "classifier"):
        _patches(of, mesh, sequence)
    elif not linear_pairs.spread(model, mesh):
        known = (
            "a model of torchweld.models, or one of transformers whose attention has linear layers of the names in "
            "torchweld.distributed.linear_pairs.PAIRS"
        )
        fail(_OP, "model", known, type(model).__name__, "write a plan for parallelize_module: every op takes DTensors")
    return model


def _has(model: nn.Module, *names: str) -> bool:
    try:
        return all(isinstance(model.get_submodule(name), nn.Module) for name in names)
    except AttributeError:
        return False


# ---- Layers


@dataclass(frozen=True)
class _Names:
    """Of the linear layers in a layer: what is cut along its outputs, and along its inputs.

    Attributes:
        fused: those that make several kinds of heads at once, and how many kinds.
    """

    fused: Mapping[str, int]
    columns: tuple[str, ...]
    rows: tuple[str, ...]


_GPT = _Names({"attn.c_attn": 3}, ("mlp.c_fc",), ("attn.c_proj", "mlp.c_proj"))
_ENCODER = _Names({"qkv": 3}, ("up",), ("proj", "down"))
_SOURCES = _Names({"self_attn.qkv": 3}, ("fc1",), ("self_attn.out_proj", "fc2"))
_TARGETS = _Names(
    {**_SOURCES.fused, "encoder_attn.kv": 2},
    (*_SOURCES.columns, "encoder_attn.q_proj"),
    (*_SOURCES.rows, "encoder_attn.out_proj"),
)


@dataclass(frozen=True)
class _Stack:
    """Layers to be spread.

    Attributes:
        stream: how the stream between them lies in the processes.
    """

    layers: nn.ModuleList
    names: _Names
    heads: int
    stream: Placement
    mesh: DeviceMesh

    def spread(self) -> None:
        """All parameters of the layers become DTensors, and so do their arguments and results."""
        plan: dict[str, Any] = dict.fromkeys(self.names.rows, RowwiseParallel(output_layouts=self.stream, **_KEPT))
        plan |= dict.fromkeys(self.names.columns, ColwiseParallel(input_layouts=self.stream, **_KEPT))
        for layer in self.layers:
            for name, kinds in self.names.fused.items():
                _spread_heads(layer.get_submodule(name), self.mesh, kinds, self.heads)
            parallelize_module(layer, self.mesh, plan)
            distribute_module(layer, self.mesh)  # all that is left has copies

    def enter(self, module: nn.Module) -> None:
        """The first argument of `module`, plain and the same in all processes, becomes the stream."""
        module.register_forward_pre_hook(lambda _, inputs: (self._cut(inputs[0]), *inputs[1:]))

    def _cut(self, x: Tensor) -> Tensor:
        return _copies(x, self.mesh).redistribute(placements=[self.stream])

    def leave(self, module: nn.Module) -> None:
        """The results of `module` become plain, the same in all processes."""
        module.register_forward_hook(lambda _, inputs, outputs: _plain(outputs))


def _copies(x: Tensor, mesh: DeviceMesh) -> DTensor:
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False)


def _plain(of: Any) -> Any:
    """Whole in every process; of a tuple, each."""
    if isinstance(of, tuple):
        return tuple(_plain(each) for each in of)
    return of.redistribute(placements=[Replicate()]).to_local() if isinstance(of, DTensor) else of


def _spread_heads(linear: nn.Module, mesh: DeviceMesh, kinds: int, heads: int) -> None:
    """A layer that makes queries, keys and values at once: each process has the rows of its heads, of all kinds."""
    assert isinstance(linear, nn.Linear)
    rows = torch.arange(linear.out_features).view(kinds, mesh.size(), -1).transpose(0, 1).flatten()
    setattr(linear, ORDER, Order(rows, 0))

    def partition(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for each, p in list(module.named_parameters(recurse=False)):
            module.register_parameter(each, nn.Parameter(distribute_tensor(p.detach()[rows], mesh, [Shard(0)])))

    def gather(module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        return inputs[0].redistribute(placements=[Replicate()])

    def as_heads(module: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
        part = output.to_local().unflatten(-1, (kinds, heads // mesh.size(), -1))
        return DTensor.from_local(part, mesh, [Shard(part.dim() - 2)], run_check=False)

    distribute_module(linear, mesh, partition, gather, as_heads)


# ---- Models


def _gpt(model: Any, mesh: DeviceMesh, sequence: bool) -> None:
    stream = Shard(1) if sequence else Replicate()
    _Stack(model.h, _GPT, model.config.n_head, stream, mesh).spread()
    parallelize_module(model.wte, mesh, RowwiseParallel(input_layouts=Replicate(), output_layouts=stream, **_KEPT))
    distribute_module(model, mesh)


def _vocabulary(embedding: nn.Module, mesh: DeviceMesh) -> None:
    """Each process has the rows of its words; what it gives is plain."""
    parallelize_module(embedding, mesh, RowwiseParallel(input_layouts=Replicate()))


def _encoder(model: Any, mesh: DeviceMesh, stream: Placement) -> None:
    """Layers between whole tensors."""
    stack = _Stack(model.layers, _ENCODER, model.config.num_attention_heads, stream, mesh)
    stack.spread()
    stack.enter(model.layers[0])
    stack.leave(model.layers[-1])


def _bert(model: Any, mesh: DeviceMesh, sequence: bool) -> None:
    """Packed: (T, C)."""
    _encoder(model, mesh, Shard(0) if sequence else Replicate())
    _vocabulary(model.embeddings.word_embeddings, mesh)


def _words(model: Any, mesh: DeviceMesh) -> None:
    """The head of a BERT that reads its words once more, if it has one: logits of the words of each process."""
    if not _has(model, "transform", "norm"):
        return
    model.norm.register_forward_hook(lambda _, inputs, outputs: (_copies(outputs[0], mesh), outputs[1]))
    model.bias = nn.Parameter(distribute_tensor(model.bias.detach(), mesh, [Shard(0)]))
    loss = model.cross_entropy
    model.cross_entropy = lambda *args: _plain(loss(*args))


def _patches(model: Any, mesh: DeviceMesh, sequence: bool) -> None:
    """A ViT or an AST: (B, N, C), a sequence of patches whose embedding and head are not spread."""
    _encoder(model, mesh, Shard(1) if sequence else Replicate())


def _seq2seq(model: Any, mesh: DeviceMesh, sequence: bool) -> None:
    """Packed: (S, C) and (T, C). Every layer of the decoder reads the encoder's output, which is gathered once."""
    config, stream = model.config, Shard(0) if sequence else Replicate()
    for side, names, heads in (
        (model.encoder, _SOURCES, config.encoder_attention_heads),
        (model.decoder, _TARGETS, config.decoder_attention_heads),
    ):
        stack = _Stack(side.layers, names, heads, stream, mesh)
        stack.spread()
        stack.enter(side.layers[0])

    def gather(module: nn.Module, inputs: Any, outputs: Any) -> Any:
        return outputs[0].redistribute(placements=[Replicate()]), outputs[1]

    for side in (model.encoder, model.decoder):
        distribute_module(side.layer_norm, mesh)
    model.encoder.layer_norm.register_forward_hook(gather)
    _vocabulary(model.shared, mesh)
