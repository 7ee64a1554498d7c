"""Tensor and sequence parallel: the layers of a model spread over devices, by torch's parallelize_module.

Of a pair of linear layers the first is cut along its outputs (heads, hidden units), the second along its inputs, and
one sum follows. With `sequence` what lies between the pairs (norms, residual adds, dropout) is cut along the tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from torchweld.ops._attention_checks import fail

_OP = "tensor_parallel"
_ORDER = "_torchweld_rows"  # of a module: the order in which the rows of its parameters lie in all processes


def tensor_parallel(model: nn.Module, mesh: DeviceMesh, *, sequence: bool = True) -> nn.Module:
    """Spreads a model over the devices of `mesh`, in place.

    A torchweld.models GPT2 or GPT3 has its heads, hidden units and vocabulary spread; its parameters and what lies
    between its layers become DTensors. A Llama-like model of transformers has its heads and hidden units spread, and
    sees plain tensors; `torchweld.patch` may come before or after. Every process must have the same weights and see the
    same tokens. `full_parameter` and `local_parameter` lead from a parameter to the whole one and back.

    Args:
        mesh: of one dimension.
        sequence: also cut the stream between the layers along the tokens; of GPT2 and GPT3.

    Returns:
        The model itself.

    Raises:
        RuntimeError: heads that do not divide, a mesh of several dimensions, or a model without a plan.
    """
    if mesh.ndim != 1:
        fail(_OP, "mesh", "one dimension, over which layers are spread", mesh.ndim, "take one of them, mesh['name']")
    layers = getattr(getattr(model, "model", None), "layers", None)
    if isinstance(layers, nn.ModuleList) and all(hasattr(getattr(x, "self_attn", None), "q_proj") for x in layers):
        _llama(model, layers, mesh)
    elif isinstance(getattr(model, "h", None), nn.ModuleList) and hasattr(model, "wte"):
        _gpt(model, mesh, sequence)
    else:
        known = "a GPT2 or GPT3 of torchweld.models, or a model of transformers with model.layers.N.self_attn.q_proj"
        fail(_OP, "model", known, type(model).__name__, "write a plan for parallelize_module: every op takes DTensors")
    return model


def _divides(mesh: DeviceMesh, name: str, count: int) -> None:
    if count % mesh.size():
        fail(_OP, "mesh", f"a number of devices that divides the model's {count} {name}", mesh.size())


def _gpt(model: Any, mesh: DeviceMesh, sequence: bool) -> None:
    config = model.config
    _divides(mesh, "heads", config.n_head)
    stream = Shard(1) if sequence else Replicate()
    kept: dict[str, Any] = {"use_local_output": False}
    plan: dict[str, Any] = {"wte": RowwiseParallel(input_layouts=Replicate(), output_layouts=stream, **kept)}
    for i in range(len(model.h)):
        plan[f"h.{i}.attn.c_proj"] = RowwiseParallel(output_layouts=stream, **kept)
        plan[f"h.{i}.mlp.c_fc"] = ColwiseParallel(input_layouts=stream, **kept)
        plan[f"h.{i}.mlp.c_proj"] = RowwiseParallel(output_layouts=stream, **kept)
    for block in model.h:
        _spread_heads(block.attn.c_attn, mesh, config.n_head)
    parallelize_module(model, mesh, plan)
    distribute_module(model, mesh)  # all that is left has copies


def _spread_heads(linear: nn.Linear, mesh: DeviceMesh, heads: int) -> None:
    """A layer that makes queries, keys and values at once: each process has the rows of its heads, of all three."""
    rows = torch.arange(linear.out_features).view(3, mesh.size(), -1).transpose(0, 1).flatten()
    setattr(linear, _ORDER, rows)

    def partition(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for each, p in list(module.named_parameters(recurse=False)):
            module.register_parameter(each, nn.Parameter(distribute_tensor(p.detach()[rows], mesh, [Shard(0)])))

    def gather(module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        return inputs[0].redistribute(placements=[Replicate()])

    def as_heads(module: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
        part = output.to_local().unflatten(-1, (3, heads // mesh.size(), -1))
        return DTensor.from_local(part, mesh, [Shard(3)], run_check=False)

    distribute_module(linear, mesh, partition, gather, as_heads)


def _llama(model: nn.Module, layers: nn.ModuleList, mesh: DeviceMesh) -> None:
    config: Any = model.config
    _divides(mesh, "heads", config.num_attention_heads)
    _divides(mesh, "key heads", getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    plan: dict[str, Any] = {}
    for i, layer in enumerate(layers):
        for name, style in (
            ("self_attn.q_proj", ColwiseParallel),
            ("self_attn.k_proj", ColwiseParallel),
            ("self_attn.v_proj", ColwiseParallel),
            ("self_attn.o_proj", RowwiseParallel),
            ("mlp.gate_proj", ColwiseParallel),
            ("mlp.up_proj", ColwiseParallel),
            ("mlp.down_proj", RowwiseParallel),
        ):
            if not isinstance(_submodule(layer, name), nn.Linear):
                fail(_OP, "model", f"a torch.nn.Linear model.layers.{i}.{name}", "a model without it")
            plan[f"model.layers.{i}.{name}"] = style()
    parallelize_module(model, mesh, plan)


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


# ---- Whole parameters, as they are in a model that is not spread


def _rows_of(model: nn.Module, name: str) -> Tensor | None:
    rows: Tensor | None = getattr(model.get_submodule(name.rpartition(".")[0]), _ORDER, None)
    return rows


def full_parameter(model: nn.Module, name: str, t: Tensor) -> Tensor:
    """The whole of `t`, the parameter `name` of a spread model or what an optimizer keeps of it, in every process."""
    if not isinstance(t, DTensor):
        return t
    whole = t.full_tensor()
    rows = _rows_of(model, name)
    if rows is None or whole.dim() == 0:
        return whole
    found = torch.empty_like(whole)
    found[rows.to(whole.device)] = whole
    return found


def local_parameter(model: nn.Module, name: str, like: Tensor, whole: Tensor) -> Tensor:
    """The inverse of `full_parameter`: `whole` in the layout of `like`, the parameter `name`."""
    if not isinstance(like, DTensor) or whole.dim() == 0:
        return whole
    rows = _rows_of(model, name)
    if rows is not None:
        whole = whole[rows.to(whole.device)]
    whole = whole.to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
