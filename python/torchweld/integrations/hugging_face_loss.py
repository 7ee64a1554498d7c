"""The loss of Hugging Face language models from the input of their output layer: unread logits are not made.

In a training call with labels the output layer returns `LateLogits` in place of logits. The models' own code hands them
to its loss.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchweld._torch import forward_mode_is_on, has_global_hooks, has_hooks, tracing, transforms_active
from torchweld.integrations.late_logits import LateLogits
from torchweld.ops._register import under_autocast


def is_language_model(cls: Any) -> bool:
    """Whether a class of transformers has an output layer over a vocabulary, and makes a loss of its logits."""
    named = cls.__name__.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration"))
    return named and hasattr(cls, "get_output_embeddings") and "labels" in inspect.signature(cls.forward).parameters


def why_no_loss(model: Any) -> str | None:
    """Why the loss of a model stays as it is; None if it does not."""
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        return f"its output layer is a {type(head).__name__}, no torch.nn.Linear"
    return None


def late_forward(stock: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a class, with late logits in a training call with labels."""

    @wraps(stock)
    def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
        head = model.get_output_embeddings()
        if (
            kwargs.get("labels") is None
            or not (model.training and torch.is_grad_enabled())
            or torch.compiler.is_compiling()
            or transforms_active()
            or forward_mode_is_on()
            or tracing()
            or type(head) is not torch.nn.Linear
            or "forward" in vars(head)
            or has_hooks(head)
            or has_global_hooks()
        ):
            return stock(model, *args, **kwargs)
        with _late(head):
            return stock(model, *args, **kwargs)

    return forward


@contextmanager
def _late(head: torch.nn.Linear) -> Iterator[None]:
    """Inside, `head` returns late logits."""

    def call(hidden: Tensor) -> Tensor:
        weight, bias = head.weight, head.bias
        dtype = torch.get_autocast_dtype(hidden.device.type) if under_autocast(hidden) else weight.dtype
        if type(hidden) is not Tensor or (hidden.dtype is not weight.dtype and not under_autocast(hidden)):
            return F.linear(hidden, weight, bias)
        return LateLogits.of(hidden, weight, bias, dtype)

    head.__dict__["forward"] = call
    try:
        yield
    finally:
        head.__dict__.pop("forward", None)  # a call in another thread may have taken it away
