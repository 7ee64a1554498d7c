"""How a function of torchweld.ops runs on DTensors: on the parts of each process, by the rule of the function.

A rule labels the dimensions along which the function may be cut: what it computes for one part of a label needs nothing
of the others. On each dimension of the mesh one label is cut, that of the first argument which is sharded along one.
Arguments and results with this label are sharded along it. The others are replicated, and their gradients are sums over
the processes, for each process sees a part of the calls that they serve. A layout that no rule allows is redistributed.

torch's register_sharding, which gives a rule to an operator, would not do. The operators behind an op hand each other
row statistics by flattened rows, and a layout of these says nothing of the order of rows in a sharded sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

Labels = tuple[str | None, ...]  # of the dimensions of a tensor; None: never cut


@dataclass(frozen=True)
class Rule:
    """Along what the arguments and results of one call may be cut.

    Attributes:
        inputs: the labels of each argument that is a tensor.
        outputs: those of each result.
        like: each result has the sizes of this argument along its labels, which need not correspond to those of others:
            every argument is cut by its own size.
    """

    inputs: Mapping[str, Labels]
    outputs: Sequence[Labels]
    like: Sequence[str] = ()


@dataclass(frozen=True)
class Layout:
    """What each dimension of the mesh cuts, and the sizes of the labels."""

    mesh: DeviceMesh
    cuts: tuple[str | None, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_cut(self) -> bool:
        return any(cut is not None for cut in self.cuts)

    def placements(self, labels: Labels, shape: Sequence[int] | None = None) -> list[Placement]:
        """Of a tensor with these labels. One that is broadcast along a label (size 1) is whole everywhere."""
        found: list[Placement] = []
        for cut in self.cuts:
            at = labels.index(cut) if cut is not None and cut in labels else None
            broadcast = at is not None and shape is not None and shape[at] == 1 and self.sizes[labels[at] or ""] != 1
            found.append(Replicate() if at is None or broadcast else Shard(at))
        return found

    def sums(self, placements: Sequence[Placement]) -> list[Placement]:
        """Of the gradient of a tensor with `placements`, or of a sum over its parts."""
        return [
            Partial() if cut is not None and isinstance(p, Replicate) else p
            for cut, p in zip(self.cuts, placements, strict=True)
        ]

    def part(self) -> int:
        """The number of this process's part: processes with copies of one part have one number."""
        number = 0
        for d, cut in enumerate(self.cuts):
            if cut is not None:
                number = number * self.mesh.size(d) + self.mesh.get_local_rank(d)
        return number

    def local(self, t: DTensor, labels: Labels) -> Tensor:
        """This process's part of `t`; differentiable."""
        wanted = self.placements(labels, t.shape)
        if tuple(t.placements) != tuple(wanted):
            t = t.redistribute(placements=wanted)
        return t.to_local(grad_placements=self.sums(wanted))

    def whole(self, t: Tensor, labels: Labels, sizes: Mapping[str | None, int] | None = None) -> Tensor:
        """The DTensor of which `t` is this process's part. `sizes`: of its labels, where they are its own."""
        known: Mapping[Any, int] = self.sizes if sizes is None else sizes
        shape = tuple(
            size if label is None or label not in self.cuts else known[label]
            for size, label in zip(t.shape, labels, strict=True)
        )
        strides, distance = [0] * t.dim(), 1
        for at in sorted(range(t.dim()), key=lambda d: (t.stride(d), -d)):  # the order in memory is that of the parts
            strides[at] = distance
            distance *= max(shape[at], 1)
        placements = self.placements(labels)
        return DTensor.from_local(
            t, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(strides)
        )

    def total(self, t: Tensor) -> Tensor:
        """The sum of `t` over all parts, as a DTensor that is whole everywhere."""
        placements: list[Placement] = [Partial() if cut is not None else Replicate() for cut in self.cuts]
        summed = DTensor.from_local(t, self.mesh, placements, run_check=False)
        return summed.redistribute(placements=[Replicate()] * len(placements))


def distributed(op: str, tensors: Mapping[str, Tensor | None]) -> tuple[DeviceMesh, dict[str, DTensor]]:
    """The mesh of the arguments, and all of them as DTensors: a plain tensor is the same in all processes.

    Raises:
        RuntimeError: DTensors of several meshes.
        TypeError: a plain tensor that requires a gradient, whose layout nothing says.
    """
    mesh: DeviceMesh | None = None
    for name, t in tensors.items():
        if isinstance(t, DTensor):
            if mesh is not None and t.device_mesh != mesh:
                raise RuntimeError(
                    f"[{op}] {name}: expected a DTensor on the mesh of the other arguments, {mesh}, but got one on "
                    f"{t.device_mesh}; redistribute it"
                )
            mesh = t.device_mesh
    assert mesh is not None
    found: dict[str, DTensor] = {}
    for name, t in tensors.items():
        if isinstance(t, DTensor):
            found[name] = t
        elif t is not None:
            if t.requires_grad and torch.is_grad_enabled():
                raise TypeError(
                    f"[{op}] {name}: expected a DTensor beside other DTensors, but got a torch.Tensor that requires a "
                    f"gradient; use torch.distributed.tensor.distribute_tensor"
                )
            found[name] = DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return mesh, found


def layout_of(mesh: DeviceMesh, tensors: Mapping[str, DTensor], rule: Rule) -> Layout:
    """What each dimension of the mesh cuts: the label of the first argument that is sharded along one there."""
    by_label: dict[str, list[int]] = {}
    for name, t in tensors.items():
        for label, size in zip(rule.inputs.get(name, ()), t.shape, strict=False):
            if label is not None:
                by_label.setdefault(label, []).append(size)
    sizes = {label: max(found) for label, found in by_label.items()}
    parts: dict[str, int] = {}
    cuts: list[str | None] = []
    for d in range(mesh.ndim):
        chosen = None
        for name, t in tensors.items():
            placement, labels = t.placements[d], rule.inputs.get(name, ())
            label = labels[placement.dim] if type(placement) is Shard and placement.dim < len(labels) else None
            if chosen is not None or label is None or t.shape[labels.index(label)] == 1 != sizes[label]:
                continue
            count = parts.get(label, 1) * mesh.size(d)
            own = [tensors[n].shape[rule.inputs[n].index(label)] for n in rule.like if n in tensors]
            if any(parts_of(count, size, count - 1)[0] >= size for size in own or [sizes[label]]):
                continue  # not enough for a part in every process
            different = {size for size in by_label[label] if size != 1}
            # Grouped heads correspond part by part only where each argument's are shared out evenly.
            if rule.like or len(different) <= 1 or all(size % count == 0 for size in different):
                chosen, parts[label] = label, count
        cuts.append(chosen)
    return Layout(mesh, tuple(cuts), sizes)


def run(
    op: str,
    function: Callable[..., Any],
    tensors: Mapping[str, Tensor | None],
    rule: Rule,
    seeded: Callable[[Layout, dict[str, Any]], None] | None = None,
) -> Any:
    """`function` of the parts of its arguments, by name; its results as DTensors.

    Args:
        seeded: what gives the parts of random numbers of their own.
    """
    mesh, found = distributed(op, tensors)
    layout = layout_of(mesh, found, rule)
    parts: dict[str, Any] = {name: layout.local(t, rule.inputs[name]) for name, t in found.items()}
    if seeded is not None:
        seeded(layout, parts)
    results = function(**parts)
    sizes: list[dict[str | None, int] | None] = [None] * len(rule.outputs)
    if rule.like:
        sizes = [dict(zip(rule.inputs[name], found[name].shape, strict=True)) for name in rule.like if name in found]
    if isinstance(results, Tensor):
        return layout.whole(results, rule.outputs[0], sizes[0])
    return tuple(layout.whole(*result) for result in zip(results, rule.outputs, sizes, strict=True))


def parts_of(count: int, size: int, index: int) -> tuple[int, int]:
    """Where part `index` of `count` begins and ends, as Shard cuts `size`."""
    each = math.ceil(size / count)
    return min(index * each, size), min((index + 1) * each, size)
