"""What the tests of the Transformer layers share: modules beside torch's, inputs and masks."""

from __future__ import annotations

from typing import Any

import torch

from torchweld import nn

BATCH, N, M, WIDTH, HEADS = 3, 9, 7, 16, 2
LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def twins(cls: type[torch.nn.Module], *args: Any, **kwargs: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """torch's module and ours, of the same random parameters."""
    theirs = cls.__bases__[0](*args, **kwargs)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ours = cls(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def layers(cls: type[torch.nn.Module], **options: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    return twins(cls, WIDTH, HEADS, 24, 0.0, **options)


def inputs(cls: type[torch.nn.Module], batch_first: bool) -> list[torch.Tensor]:
    shapes = [(BATCH, n, WIDTH) if batch_first else (n, BATCH, WIDTH) for n in (N, M)]
    return [torch.randn(s) for s in shapes[: 2 if "Decoder" in cls.__name__ else 1]]


def masks(cls: type[torch.nn.Module], kind: str) -> dict[str, torch.Tensor]:
    """Causal over the first input, padding in the other; as booleans or as numbers."""
    causal, padding = torch.ones(N, N, dtype=torch.bool).triu(1), torch.arange(N).expand(BATCH, N) > N - 3
    names = {"src_mask": causal, "src_key_padding_mask": padding}
    if "Decoder" in cls.__name__:
        names = {"tgt_mask": causal, "memory_key_padding_mask": padding[:, 2:]}
    if kind == "float":
        return {k: torch.zeros(m.shape).masked_fill_(m, -torch.inf) for k, m in names.items()}
    return names
