"""One model with its optimizer, schedule and history: what a step, a validation and a comparison need."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import torchweld
import torchweld.optim
from torchweld.errors import UserError
from torchweld.models import stock
from torchweld.models.gpt2 import GPT2, GPT2Config
from torchweld.training.processes import Processes
from torchweld.training.settings import Settings

MAX_GRAD_NORM = 1.0
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.99)  # the second one lower than usual: a run of a few hundred steps has no long memory to keep

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OURS, RIVALS = "torchweld", ("torch", "torch.compile")


class _Loss(nn.Module):
    """The model as a function of inputs and targets, (B, N) each, that DistributedDataParallel can wrap."""

    def __init__(self, model: GPT2, compiled: bool) -> None:
        super().__init__()
        self.model = model
        self.loss = torch.compile(model.loss) if compiled else model.loss

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss(inputs, targets)


class Trainer:
    """Trains a GPT-2: on torchweld's functions and optimizer, or as one of `RIVALS` on torch's own.

    Several processes share each batch; DistributedDataParallel averages their gradients.

    Attributes:
        losses, seconds: of each step; `seconds` only of those that this process ran.
        validation: (step, loss) pairs.
    """

    def __init__(
        self, config: GPT2Config, settings: Settings, processes: Processes, dtype: str, name: str = OURS
    ) -> None:
        self.name, self.settings, self.processes, self.dtype = name, settings, processes, DTYPES[dtype]
        self.device = torch.device(processes.device)
        self.model = GPT2(config, torchweld.ops if name == OURS else stock).to(self.device)
        self.loss: nn.Module = _Loss(self.model, compiled=name == "torch.compile")
        if processes.count > 1:
            self.loss = DistributedDataParallel(self.loss)
        groups, rate = self.model.parameter_groups(WEIGHT_DECAY), settings.learning_rate
        self.optimizer: torch.optim.Optimizer
        if name == OURS:
            self.optimizer = torchweld.optim.AdamW(groups, rate, BETAS, max_grad_norm=MAX_GRAD_NORM)
        else:
            self.optimizer = torch.optim.AdamW(groups, rate, BETAS, fused=True)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.validation: list[tuple[int, float]] = []

    @property
    def step(self) -> int:
        """How many updates the weights have had."""
        return len(self.losses)

    def advance(self, inputs: Tensor, targets: Tensor) -> None:
        """One update from the inputs and targets (B, N) of all processes.

        Raises:
            UserError: the loss is not finite; going on would only spend time.
        """
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(self.step)
        # Dropout, like the batches, is a function of seed and step alone, so resuming is free.
        seed = np.random.default_rng((self.settings.seed, self.step, self.processes.rank)).integers(2**63)
        torch.manual_seed(int(seed))
        loss = self._evaluate(self.loss, self.processes.share(inputs), self.processes.share(targets))
        self.optimizer.zero_grad()
        loss.backward()
        if self.name != OURS:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        (value,) = self.processes.mean(loss.item())
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # item() waits for the loss, not for the update that follows it
        if not math.isfinite(value):
            raise UserError(
                f"training diverged: expected a finite loss, but that of step {self.step + 1} is {value}; "
                f"lower --learning-rate (now {self.settings.learning_rate:g})"
            )
        self.losses.append(value)
        self.seconds.append(time.perf_counter() - start)

    @torch.no_grad()
    def validate(self, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
        """The mean loss in nats per token over batches of inputs and targets (B, N); also kept in `validation`."""
        self.model.eval()
        total, count = 0.0, 0.0
        for inputs, targets in batches[self.processes.rank :: self.processes.count]:
            total += self._evaluate(self.model.loss, inputs, targets).item() * targets.numel()
            count += targets.numel()
        total, count = self.processes.mean(total, count)
        self.model.train()
        self.validation.append((self.step, total / count))
        return total / count

    def _evaluate(self, loss: Callable[..., Any], inputs: Tensor, targets: Tensor) -> Tensor:
        # bfloat16 is autocast over float32 weights: most updates of AdamW are too small for a weight of 8 bits to move.
        precision: AbstractContextManager[None] = torch.autocast(
            self.device.type, self.dtype, enabled=self.dtype != torch.float32
        )
        with precision:
            return loss(inputs.to(self.device), targets.to(self.device))
