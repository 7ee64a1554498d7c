"""Tensor parallel for models of transformers: pairs of linear layers, found by their names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from torchweld.distributed.whole import ORDER, Order
from torchweld.ops._attention_checks import fail

_OP = "tensor_parallel"


class Pair(NamedTuple):
    """Linear layers of one module.

    Attributes:
        columns: they read the stream, and are cut along their outputs.
        row: it reads what is made of theirs element by element or head by head, and is cut along its inputs.
        attention: where the attention is that makes heads of them, in the module; None for an MLP.
        kinds: how many kinds of heads each of `columns` makes, one after another.
    """

    columns: tuple[str, ...]
    row: str
    attention: str | None = None
    kinds: int = 1


PAIRS = (
    Pair(("q_proj", "k_proj", "v_proj"), "o_proj", ""),  # Llama, Qwen, Mistral, Gemma, ViT
    Pair(("q_proj", "k_proj", "v_proj"), "out_proj", ""),  # BART, Whisper, OPT, CLIP
    Pair(("q_lin", "k_lin", "v_lin"), "out_lin", ""),  # DistilBERT
    Pair(("q", "k", "v"), "o", ""),  # T5
    Pair(("self.query", "self.key", "self.value"), "output.dense", "self"),  # BERT, RoBERTa, ELECTRA
    Pair(("c_attn",), "c_proj", "", kinds=3),  # GPT-2
    Pair(("gate_proj", "up_proj"), "down_proj"),
    Pair(("fc1",), "fc2"),
    Pair(("lin1",), "lin2"),
    Pair(("wi_0", "wi_1"), "wo"),
    Pair(("wi",), "wo"),
    Pair(("intermediate.dense",), "output.dense"),
    Pair(("c_fc",), "c_proj"),
)
_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim")
_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "n_heads", "split_size")
_BY_HEAD = "relative_attention_bias"  # T5's: an embedding with a number for each head


class _Found(NamedTuple):
    """A pair in a model."""

    name: str
    module: nn.Module
    pair: Pair

    @property
    def columns(self) -> list[nn.Module]:
        return [self.module.get_submodule(name) for name in self.pair.columns]

    @property
    def row(self) -> nn.Module:
        return self.module.get_submodule(self.pair.row)

    @property
    def attention(self) -> nn.Module:
        return self.module.get_submodule(self.pair.attention or "")

    @property
    def head_size(self) -> int:
        """0 where there are no heads."""
        sizes = (getattr(self.attention, name, None) for name in _SIZES)
        return next((size for size in sizes if isinstance(size, int)), 0)

    def fits(self) -> bool:
        """Whether the module has the pair."""
        try:
            linears = [*self.columns, self.row, self.attention]
        except AttributeError:
            return False
        if not all(isinstance(each, nn.Linear) or _is_conv(each) for each in linears[:-1]):
            return False
        made, read = _outputs(linears[0]), _sizes(self.row)[1]
        return made == self.pair.kinds * read and (self.pair.attention is None or self.head_size > 0)

    def others(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of the attention that are none of the pair's."""
        own = {id(p) for linear in (*self.columns, self.row) for p in linear.parameters()}
        for name, p in self.attention.named_parameters():
            if id(p) not in own and not name.startswith(_BY_HEAD):
                yield name, p


def _is_conv(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D: a linear layer with a weight (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _outputs(linear: nn.Module) -> int:
    return _sizes(linear)[0]


def _sizes(linear: Any) -> tuple[int, int]:
    """Outputs and inputs."""
    rows, columns = linear.weight.shape
    return (columns, rows) if _is_conv(linear) else (rows, columns)


def spread(model: nn.Module, mesh: DeviceMesh) -> bool:
    """Spreads all pairs that there are; whether there was one of an attention.

    Raises:
        RuntimeError: heads that do not divide, or an attention with parameters of heads that no pair has.
    """
    every = [_Found(name, module, pair) for name, module in model.named_modules() for pair in PAIRS]
    found = [each for each in every if each.fits()]
    attentions = [each for each in found if each.pair.attention is not None]
    for each in attentions:  # all checks come before the first change
        _check(each, mesh)
    for each in attentions:
        _own_heads(each, mesh)
    for each in found if attentions else []:
        _spread_pair(each, mesh)
    return bool(attentions)


def _check(found: _Found, mesh: DeviceMesh) -> None:
    for what, linear in zip(("heads", "key heads", "value heads"), found.columns, strict=False):
        heads = _outputs(linear) // found.pair.kinds // found.head_size
        if heads % mesh.size():
            fail(_OP, "mesh", f"a number of devices that divides the model's {heads} {what}", mesh.size())
    for name, p in found.others():
        if list(p.shape) != [found.head_size]:
            known = f"an attention with no parameters of its own but those of a head, [{found.head_size}]"
            got = f"{found.name}.{name} {list(p.shape)}"
            fail(_OP, "model", known, got, "write a plan for parallelize_module: every op takes DTensors")


def _own_heads(found: _Found, mesh: DeviceMesh) -> None:
    """An attention counts the heads of this process; what all heads share learns from those of all processes."""
    attention: Any = found.attention
    for name in _COUNTS:
        if isinstance(getattr(attention, name, None), int):
            setattr(attention, name, getattr(attention, name) // mesh.size())
    if hasattr(attention, _BY_HEAD):
        parallelize_module(attention, mesh, {_BY_HEAD: ColwiseParallel()})
    group = mesh.get_group()

    def add_up(grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    for _, p in found.others():
        if p.requires_grad:
            p.register_hook(add_up)


def _spread_pair(found: _Found, mesh: DeviceMesh) -> None:
    for linear in found.columns:
        if _is_conv(linear):
            order = torch.arange(_outputs(linear)).view(found.pair.kinds, mesh.size(), -1).transpose(0, 1).flatten()
            setattr(linear, ORDER, Order(order, -1))
            _spread_conv(linear, mesh, {"weight": Shard(1), "bias": Shard(0)}, Replicate(), Shard(-1))
        else:
            parallelize_module(linear, mesh, ColwiseParallel())
    if _is_conv(found.row):
        _spread_conv(found.row, mesh, {"weight": Shard(0), "bias": Replicate()}, Shard(-1), Replicate())
    else:
        parallelize_module(found.row, mesh, RowwiseParallel())


def _spread_conv(
    conv: nn.Module, mesh: DeviceMesh, parameters: dict[str, Placement], reads: Placement, gives: Placement
) -> None:
    """As ColwiseParallel and RowwiseParallel do it for nn.Linear."""

    def partition(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for each, placement in parameters.items():
            p: Tensor = getattr(module, each).detach()
            if hasattr(module, ORDER):
                p = p[..., getattr(module, ORDER).places]
            module.register_parameter(each, nn.Parameter(distribute_tensor(p, mesh, [placement], src_data_rank=None)))

    def enter(module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        return DTensor.from_local(inputs[0], mesh, [reads], run_check=False)

    def leave(module: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
        return output.redistribute(placements=[gives]).to_local()

    distribute_module(conv, mesh, partition, enter, leave)
