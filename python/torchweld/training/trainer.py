"""One model with its optimizer, schedule and history: what a step, a validation and a comparison need."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import torchweld
from torchweld.errors import UserError
from torchweld.models import stock
from torchweld.training import optimizers
from torchweld.training.processes import Processes
from torchweld.training.program import Batch, Program
from torchweld.training.settings import Settings
from torchweld.training.sharing import sharing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OURS, RIVALS = "torchweld", ("torch", "torch.compile")


class _Losses(nn.Module):
    """The model as a function of a batch's tensors, which DistributedDataParallel can wrap."""

    def __init__(self, program: Program, model: nn.Module, compiled: bool) -> None:
        super().__init__()
        self.model = model
        self.losses = torch.compile(program.losses) if compiled else program.losses

    def forward(self, *tensors: Tensor) -> dict[str, Tensor]:
        return self.losses(self.model, *tensors)


class Trainer:
    """Trains the model of a program: on torchweld's functions and optimizer, or as one of `RIVALS` on torch's own.

    Several processes share what `Processes.parallel` says.

    Attributes:
        losses, seconds, counts: of each step; the latter two only of those that this process ran.
        named: the losses of the last step by name.
        validation: (step, loss) pairs.
    """

    def __init__(
        self, program: Program, config: Any, settings: Settings, processes: Processes, dtype: str, name: str = OURS
    ) -> None:
        self.name, self.settings, self.processes, self.dtype = name, settings, processes, DTYPES[dtype]
        self.program, self.device = program, torch.device(processes.device)
        self.model = program.model(config, torchweld.ops if name == OURS else stock).to(self.device)
        self.sharing = sharing(program, processes)
        self.sharing.spread(self.model)
        self.loss = self.sharing.wrap(_Losses(program, self.model, compiled=name == "torch.compile"))
        self.optimizer: torch.optim.Optimizer = optimizers.build(
            settings, self.model.parameter_groups, ours=name == OURS
        )
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.counts: list[int] = []
        self.named: dict[str, float] = {}
        self.validation: list[tuple[int, float]] = []

    @property
    def step(self) -> int:
        """How many updates the weights have had."""
        return len(self.losses)

    def advance(self, parts: Sequence[Batch]) -> None:
        """One update from the parts of a batch, as many for each process: this one takes its own, one after another.

        Raises:
            UserError: the loss is not finite; going on would only spend time.
        """
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(self.step)
        # Dropout, like the batches, is a function of seed and step alone, so resuming is free.
        seed = np.random.default_rng((self.settings.seed, self.step, self._stream)).integers(2**63)
        torch.manual_seed(int(seed))
        self.optimizer.zero_grad()
        totals, own = _total(parts), self.processes.share(parts)
        shares: list[dict[str, Tensor]] = []
        for index, part in enumerate(own):
            with self._unshared() if index < len(own) - 1 else nullcontext():
                losses = self._evaluate(self.loss, part)
                # A mean over a part counts as much as its part of all items; DDP and FSDP divide by the processes.
                weights = {name: part.weights[name] / totals[name] * self.processes.replicas for name in losses}
                losses = {name: loss * weights[name] for name, loss in losses.items()}
                torch.stack([*losses.values()]).sum().backward()
            shares.append({name: loss.detach() for name, loss in losses.items()})
        if self.name != OURS:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), optimizers.MAX_GRAD_NORM)
        self.optimizer.step()
        sums = [sum(share[name].item() for share in shares) for name in totals]
        self.named = dict(zip(totals, self.processes.mean(*sums), strict=True))
        value = sum(self.named.values())
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # item() waits for the loss, not for the update that follows it
        if not math.isfinite(value):
            raise UserError(
                f"training diverged: expected a finite loss, but that of step {self.step + 1} is {value}; "
                f"lower --learning-rate (now {self.settings.learning_rate:g})"
            )
        self.losses.append(value)
        self.counts.append(sum(part.count for part in parts))
        self.seconds.append(time.perf_counter() - start)

    @torch.no_grad()
    def validate(self, batches: Sequence[Batch]) -> float:
        """The sum of the mean losses over the batches; also kept in `validation`."""
        self.model.eval()
        totals = _total(batches)
        sums = dict.fromkeys(totals, 0.0)
        replica, replicas = self.processes.replica, self.processes.replicas
        for first in range(0, len(batches), replicas):
            # Where the model is spread all processes call it equally often, so one without a batch takes the first.
            counts = first + replica < len(batches)
            batch = batches[first + replica if counts else 0]
            for name, loss in self._evaluate(self.program_losses, batch).items():
                sums[name] += loss.item() * batch.weights[name] * counts
        summed = [each * replicas for each in self.processes.mean(*sums.values())]
        mean = math.fsum(part / total for part, total in zip(summed, totals.values(), strict=True))
        self.model.train()
        self.sharing.settle(self.model)
        self.validation.append((self.step, mean))
        return mean

    def program_losses(self, *tensors: Tensor) -> dict[str, Tensor]:
        """The losses of the model itself, neither compiled nor shared among processes."""
        return self.program.losses(self.model, *tensors)

    @property
    def rates(self) -> list[float]:
        """Tokens or images a second of each step that this process ran."""
        return [count / seconds for count, seconds in zip(self.counts, self.seconds, strict=True)]

    @property
    def _stream(self) -> int:
        """Of random numbers: processes that share a layer draw the same."""
        return self.processes.replica if self.processes.parallel == "tensor" else self.processes.rank

    def _unshared(self) -> AbstractContextManager[None]:
        """Gradients stay with the process: the last part of a step adds them up over all."""
        return self.loss.no_sync() if isinstance(self.loss, DistributedDataParallel) else nullcontext()

    def _evaluate(self, losses: Callable[..., dict[str, Tensor]], batch: Batch) -> dict[str, Tensor]:
        tensors = self.sharing.inputs(tuple(tensor.to(self.device) for tensor in batch.tensors))
        with self.precision(), self.sharing.around():
            found = losses(*tensors)
        return {name: loss.full_tensor() if hasattr(loss, "full_tensor") else loss for name, loss in found.items()}

    def precision(self) -> AbstractContextManager[None]:
        """The context in which the model computes in `dtype`."""
        # bfloat16 is autocast over float32 weights: most updates of AdamW are too small for a weight of 8 bits to move.
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def _total(batches: Sequence[Batch]) -> dict[str, float]:
    """The weight of each named loss over all batches."""
    return {name: sum(batch.weights[name] for batch in batches) for name in batches[0].weights}
