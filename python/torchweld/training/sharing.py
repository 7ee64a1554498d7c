"""What the processes of a run share: a model as they have it, and the whole one that a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torchweld import ops
from torchweld.errors import UserError
from torchweld.models.published import Published
from torchweld.training.processes import Processes
from torchweld.training.program import Program

SHARED = ("data", "fsdp", "tensor", "context")


class Sharing:
    """Sequences of a batch: every process has the whole model, and DistributedDataParallel averages gradients.

    One process alone has nothing to share.

    Attributes:
        gathers: no process has the whole model, which `whole` gathers.
    """

    gathers = False

    def __init__(self, program: Program, processes: Processes) -> None:
        self.program, self.processes = program, processes

    def spread(self, model: Published) -> None:
        """Makes the model, the same in all processes, this process's."""

    def wrap(self, losses: nn.Module) -> nn.Module:
        """The module that a step calls."""
        return DistributedDataParallel(losses) if self.processes.count > 1 else losses

    def inputs(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """This process's part of a batch's tensors."""
        return tensors

    @contextmanager
    def around(self) -> Iterator[None]:
        """Inside, the model computes."""
        yield

    def settle(self, model: Published) -> None:
        """After a forward without a backward: leaves the model as a step leaves it."""

    def whole(self, model: Published) -> Published:
        """The model as one process has it. All processes call this; the first one uses it."""
        return model

    def whole_state(self, model: Published, name: str, t: Tensor) -> Tensor:
        """The whole of the parameter `name`, or of what an optimizer keeps of it."""
        return t

    def own_state(self, model: Published, name: str, whole: Tensor) -> Tensor:
        """The inverse."""
        return whole

    def part(self, model: Published, name: str, t: Tensor) -> Tensor:
        """As `whole_state`, but as far as this process has it: a part of the whole, in its order."""
        return t

    def own_part(self, model: Published, name: str, part: Tensor) -> Tensor:
        """The inverse of `part`."""
        return part

    def load(self, model: Published, weights: Mapping[str, Tensor]) -> None:
        """Loads weights in Hugging Face's layout."""
        model.load_hugging_face(weights)


class _Spread(Sharing):
    """Parameters are DTensors."""

    gathers = True

    def wrap(self, losses: nn.Module) -> nn.Module:
        return losses

    def _plain(self, model: Published) -> Published:
        with torch.random.fork_rng(devices=[]):
            return self.program.model(model.config, ops)

    def whole(self, model: Published) -> Published:
        state = {name: self.whole_state(model, name, t) for name, t in model.state_dict().items()}
        if not self.processes.first:
            return model
        plain = self._plain(model)
        plain.load_state_dict(state)
        return plain.to(self.processes.device)

    def whole_state(self, model: Published, name: str, t: Tensor) -> Tensor:
        from torchweld.distributed import full_parameter  # noqa: PLC0415  (torch's DTensors are slow to import)

        return full_parameter(model, name, t.detach())

    def own_state(self, model: Published, name: str, whole: Tensor) -> Tensor:
        from torchweld.distributed import local_parameter  # noqa: PLC0415

        return local_parameter(model, name, model.get_parameter(name), whole)

    def part(self, model: Published, name: str, t: Tensor) -> Tensor:
        from torchweld.distributed import ordered_parameter  # noqa: PLC0415

        return ordered_parameter(model, name, t.detach())

    def own_part(self, model: Published, name: str, part: Tensor) -> Tensor:
        from torchweld.distributed import spread_parameter  # noqa: PLC0415

        return spread_parameter(model, name, part)

    def load(self, model: Published, weights: Mapping[str, Tensor]) -> None:
        plain = self._plain(model)
        plain.load_hugging_face(weights)
        with torch.no_grad():
            for name, p in plain.named_parameters():
                model.get_parameter(name).copy_(self.own_state(model, name, p))


class FullySharded(_Spread):
    """Sequences of a batch, and the memory of the model: FSDP2 keeps a part of every parameter in each process."""

    def spread(self, model: Published) -> None:
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method  # noqa: PLC0415

        for stack in (m for m in model.modules() if isinstance(m, nn.ModuleList)):
            for block in stack:
                fully_shard(block)
        fully_shard(model)
        for name in ("loss", "losses"):  # a program calls the one that there is, and not the module
            if hasattr(model, name):
                register_fsdp_forward_method(model, name)

    def settle(self, model: Published) -> None:
        for module in model.modules():
            reshard = getattr(module, "reshard", None)  # the parameters of the root stay whole else
            if reshard is not None:
                reshard()


class TensorParallel(_Spread):
    """The layers of the model: heads, hidden units and vocabulary; every process sees all tokens."""

    def spread(self, model: Published) -> None:
        from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415

        from torchweld.distributed.plans import HEADS, tensor_parallel  # noqa: PLC0415

        processes = self.processes
        for heads in (getattr(model.config, name) for name in HEADS if hasattr(model.config, name)):
            if heads % processes.count:
                raise UserError(
                    f"--parallel tensor: expected a number of processes that divides the model's {heads} heads, but "
                    f"got {processes.count}; choose another --config"
                )
        tensor_parallel(model, init_device_mesh(torch.device(processes.device).type, (processes.count,)))


class ContextParallel(Sharing):
    """The tokens of each sequence; DistributedDataParallel averages gradients, as the loss is a mean over tokens."""

    def inputs(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        from torchweld.distributed import sequence_positions, shard_sequence  # noqa: PLC0415

        parts = tuple(shard_sequence(t) for t in tensors)
        return (*parts, sequence_positions(parts[0].shape[1], device=parts[0].device))

    def spread(self, model: Published) -> None:
        chunks, tokens = 2 * self.processes.count, model.config.n_positions
        if tokens % chunks:
            raise UserError(
                f"--parallel context: expected a context that {self.processes.count} processes cut into {chunks} "
                f"chunks, but got {tokens} tokens; choose another --config or number of processes"
            )

    @contextmanager
    def around(self) -> Iterator[None]:
        from torchweld.distributed import context_parallel  # noqa: PLC0415

        with context_parallel():
            yield


_KINDS: dict[str, type[Sharing]] = dict(
    zip(SHARED, (Sharing, FullySharded, TensorParallel, ContextParallel), strict=True)
)


def check_sharing(parallel: str, program: Program, rivals: object) -> None:
    """Raises UserError where the processes of a run cannot share that."""
    if parallel not in SHARED:
        raise UserError(f"--parallel: expected one of {', '.join(SHARED)}, but got {parallel!r}")
    if parallel == "data":
        return
    serves = {"context": getattr(program, "splits", False), "tensor": getattr(program, "has_heads", True)}
    if not serves.get(parallel, True):
        kind = "a decoder, gpt2 or gpt3" if parallel == "context" else "a transformer"
        raise UserError(
            f"--parallel {parallel}: expected a program whose model is {kind}, but got {program.name}; choose data or "
            f"fsdp"
        )
    if rivals is not None:
        raise UserError(
            "--compare: expected processes that share each batch, but got --parallel; leave one of both out"
        )


def sharing(program: Program, processes: Processes) -> Sharing:
    """What `processes.parallel` names."""
    return _KINDS[processes.parallel](program, processes)
