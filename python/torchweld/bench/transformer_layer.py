"""A training step of torch.nn.TransformerEncoderLayer(512, 8) on 8 x 256 tokens: torch's layer, and a patched one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor

import torchweld
from torchweld.bench.harness import Call, Settings, Work
from torchweld.testing.modules import Trial, check_modules

_BATCH, _TOKENS, _WIDTH, _HEADS, _INNER = 8, 256, 512, 8, 2048


class _Bench:
    """The same layer twice, with the same parameters, one of them patched."""

    def __init__(self, dtype: torch.dtype, device: str, dropout: float) -> None:
        torch.manual_seed(0)
        stock = torch.nn.TransformerEncoderLayer(
            _WIDTH, _HEADS, _INNER, dropout, batch_first=True, device=device, dtype=dtype
        )
        patched = copy.deepcopy(stock)
        torchweld.patch(patched)
        self.layers = {"torchweld": patched, "torch": stock}
        self.x, self.dy = (torch.randn(_BATCH, _TOKENS, _WIDTH, device=device, dtype=dtype) for _ in range(2))

    def _step(self, layer: torch.nn.Module) -> None:
        layer.zero_grad(set_to_none=True)
        layer(self.x.requires_grad_()).backward(self.dy)
        self.x.grad = None

    def calls(self) -> dict[str, Call]:
        return {name: partial(self._step, layer) for name, layer in self.layers.items()}

    def check(self) -> dict[str, float]:
        """Compares without dropout, whose draws differ. Gradients are float32, for ReLU jumps at 0."""
        for layer in self.layers.values():
            layer.eval()
        call: Callable[..., Tensor] = torch.nn.Module.__call__
        trial = Trial(self.layers["torchweld"], self.layers["torch"], call, [self.x[:1].detach()])
        verdicts = check_modules([trial], "transformer_layer", gradients=self.x.dtype == torch.float32)
        for layer in self.layers.values():
            layer.train()
        return {"torchweld": verdicts[0].error, "torch": verdicts[0].torch_error}


def _calls(bench: Callable[[], _Bench]) -> dict[str, Call]:
    return bench().calls()


def _check(bench: Callable[[], _Bench]) -> dict[str, float]:
    return bench().check()


def transformer_layer(settings: Settings) -> Iterator[Work]:
    """The layer with its default dropout, and without."""
    if "step" not in settings.directions:
        return
    # Two FLOPs for each weight and token, twice that backward; attention: two products of N x N x width, five backward.
    tokens, weights = _BATCH * _TOKENS, 4 * _WIDTH**2 + 2 * _WIDTH * _INNER
    flops = 6.0 * tokens * weights + 7 * 2.0 * tokens * _TOKENS * _WIDTH
    for dtype in settings.dtypes:
        for dropout in (0.1,) if settings.quick else (0.1, 0.0):
            bench = cache(partial(_Bench, dtype, settings.device, dropout))
            yield Work(
                op="transformer_layer",
                direction="step",
                dtype=dtype,
                case={
                    "name": f"{_BATCH} x {_TOKENS} x {_WIDTH}, {_HEADS} heads, dropout {dropout}",
                    "batch": _BATCH,
                    "tokens": _TOKENS,
                    "width": _WIDTH,
                    "heads": _HEADS,
                    "dropout": dropout,
                },
                calls=partial(_calls, bench),
                check=partial(_check, bench),
                flops=flops,
            )
