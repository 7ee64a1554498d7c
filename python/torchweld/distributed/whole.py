"""Whole parameters, as they are in a model that is not spread, and the way back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

ORDER = "_torchweld_order"  # of a module: its `Order`, where its parameters have another than in the whole model


class Order(NamedTuple):
    """How the parameters of a module lie in all processes, one after another.

    Attributes:
        places: of each row, where it is in the whole parameter.
        dim: 0, or -1 where these are columns.
    """

    places: Tensor
    dim: int


def _order_of(model: nn.Module, name: str) -> Order | None:
    order: Order | None = getattr(model.get_submodule(name.rpartition(".")[0]), ORDER, None)
    return order


def full_parameter(model: nn.Module, name: str, t: Tensor) -> Tensor:
    """The whole of `t`, the parameter `name` of a spread model or what an optimizer keeps of it, in every process."""
    if not isinstance(t, DTensor):
        return t
    whole = t.full_tensor()
    order = _order_of(model, name)
    if order is None or whole.dim() == 0:
        return whole
    return torch.empty_like(whole).index_copy_(order.dim, order.places.to(whole.device), whole)


def local_parameter(model: nn.Module, name: str, like: Tensor, whole: Tensor) -> Tensor:
    """The inverse of `full_parameter`: `whole` in the layout of `like`, the parameter `name`."""
    if not isinstance(like, DTensor) or whole.dim() == 0:
        return whole
    order = _order_of(model, name)
    if order is not None:
        whole = whole.index_select(order.dim, order.places.to(whole.device))
    whole = whole.to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def ordered_parameter(model: nn.Module, name: str, t: Tensor) -> Tensor:
    """`t` as in `full_parameter`, still spread: a DTensor in the order of the whole, or `t` if it has that.

    The parameter is whole in a process for this moment alone.
    """
    if not isinstance(t, DTensor) or t.dim() == 0 or _order_of(model, name) is None:
        return t
    part: Any = distribute_tensor(full_parameter(model, name, t), t.device_mesh, t.placements, src_data_rank=None)
    return DTensor.from_local(
        part.to_local().clone(), t.device_mesh, t.placements, run_check=False, shape=t.shape, stride=t.stride()
    )


def spread_parameter(model: nn.Module, name: str, ordered: Tensor) -> Tensor:
    """The inverse of `ordered_parameter`."""
    if not isinstance(ordered, DTensor) or ordered.dim() == 0 or _order_of(model, name) is None:
        return ordered
    return local_parameter(model, name, model.get_parameter(name), ordered.full_tensor())
