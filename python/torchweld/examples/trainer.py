"""One model with its optimizer, schedule and history: what a step, a validation and a comparison need."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

import torchweld
import torchweld.optim
from torchweld.errors import UserError
from torchweld.examples.settings import Recipe
from torchweld.models import stock
from torchweld.models.gpt2 import GPT2, GPT2Config

MAX_GRAD_NORM = 1.0
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.99)  # the second one lower than usual: a run of a few hundred steps has no long memory to keep

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Trainer:
    """Trains a GPT-2, on torchweld's functions and optimizer or, with `on_stock`, on torch's own.

    Attributes:
        losses, seconds: of each step; `seconds` only of those that this process ran.
        validation: (step, loss) pairs.
    """

    def __init__(self, config: GPT2Config, recipe: Recipe, device: str, dtype: str, on_stock: bool = False) -> None:
        self.name = "torch" if on_stock else "torchweld"
        self.recipe, self.device, self.dtype, self.on_stock = recipe, torch.device(device), DTYPES[dtype], on_stock
        self.model = GPT2(config, stock if on_stock else torchweld.ops).to(self.device)
        groups = self.model.parameter_groups(WEIGHT_DECAY)
        self.optimizer: torch.optim.Optimizer
        if on_stock:
            self.optimizer = torch.optim.AdamW(groups, recipe.learning_rate, BETAS, fused=True)
        else:
            self.optimizer = torchweld.optim.AdamW(groups, recipe.learning_rate, BETAS, max_grad_norm=MAX_GRAD_NORM)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.validation: list[tuple[int, float]] = []

    @property
    def step(self) -> int:
        """How many updates the weights have had."""
        return len(self.losses)

    def advance(self, inputs: Tensor, targets: Tensor) -> None:
        """One update from inputs and targets (B, N).

        Raises:
            UserError: the loss is not finite; going on would only spend time.
        """
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.step)
        loss = self._loss(inputs, targets)
        self.optimizer.zero_grad()
        loss.backward()
        if self.on_stock:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        value = loss.item()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # item() waits for the loss, not for the update that follows it
        if not math.isfinite(value):
            raise UserError(
                f"training diverged: expected a finite loss, but that of step {self.step + 1} is {value}; "
                f"lower --learning-rate (now {self.recipe.learning_rate:g})"
            )
        self.losses.append(value)
        self.seconds.append(time.perf_counter() - start)

    @torch.no_grad()
    def validate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
        """The mean loss in nats per token over batches of inputs and targets (B, N); also kept in `validation`."""
        self.model.eval()
        total, count = 0.0, 0
        for inputs, targets in batches:
            total += self._loss(inputs, targets).item() * targets.numel()
            count += targets.numel()
        self.model.train()
        self.validation.append((self.step, total / count))
        return total / count

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        # bfloat16 is autocast over float32 weights: most updates of AdamW are too small for a weight of 8 bits to move.
        precision: AbstractContextManager[None] = torch.autocast(
            self.device.type, self.dtype, enabled=self.dtype != torch.float32
        )
        with precision:
            return self.model.loss(inputs.to(self.device), targets.to(self.device))
