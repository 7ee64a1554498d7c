"""The loss of a language model's head, as a module."""

from __future__ import annotations

import torch
from torch import Tensor

from torchweld import ops


class LinearCrossEntropy(torch.nn.Module):
    """`torchweld.ops.linear_cross_entropy` with the weight and bias of `head`, a Linear or an Embedding of the model.

    criterion = torchweld.nn.LinearCrossEntropy(model.lm_head); loss = criterion(hidden, targets)

    The head stays where it is: its parameters are the model's, and the criterion neither lists nor saves them again.
    Its forward is not called, nor are its hooks.

    Args:
        head: what makes the logits: `torch.nn.Linear`, or the `torch.nn.Embedding` that a model shares with its head.
        ignore_index, label_smoothing, reduction, softcap, z_loss, shift: those of the function.
    """

    def __init__(
        self,
        head: torch.nn.Linear | torch.nn.Embedding,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        z_loss: float = 0.0,
        shift: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(head, (torch.nn.Linear, torch.nn.Embedding)):
            got = type(head).__name__
            raise TypeError(
                f"[LinearCrossEntropy] head: expected a torch.nn.Linear or torch.nn.Embedding, but got {got}"
            )
        self._head = (head,)  # in a tuple: no submodule
        self.ignore_index, self.label_smoothing, self.reduction = ignore_index, label_smoothing, reduction
        self.softcap, self.z_loss, self.shift = softcap, z_loss, shift

    @property
    def head(self) -> torch.nn.Linear | torch.nn.Embedding:
        return self._head[0]

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return ops.linear_cross_entropy(
            input,
            self.head.weight,
            target,
            getattr(self.head, "bias", None),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            softcap=self.softcap,
            z_loss=self.z_loss,
            shift=self.shift,
        )

    def extra_repr(self) -> str:
        classes, features = self.head.weight.shape
        shown = {"reduction": self.reduction, "softcap": self.softcap, "z_loss": self.z_loss, "shift": self.shift}
        return ", ".join([f"{features} to {classes}", *[f"{name}={value}" for name, value in shown.items() if value]])
