"""What a case is, how it is run, and the lists of cases by op."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from torchweld.testing.parity import Parity, confirm, judge

Tensors = dict[str, Tensor]
Provider = Callable[[Tensors], Tensors]

# Elements below which a case is drawn several times; elements from which torch works on it with all threads.
_SMALL, _DRAWS, _LARGE = 1 << 17, 4, 1 << 22


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """One call of one op at one size; `regime` says in a few words what that size reaches.

    Subclasses add the sizes and flags, and give the same call three times: ours, torch's and the definition's. Each
    takes the named inputs and returns the named outputs.
    """

    name: str
    regime: str
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)

    @property
    @abstractmethod
    def op(self) -> str:
        """The name it goes by in tables and on the command line."""

    @property
    def leaves(self) -> tuple[str, ...]:
        """The inputs whose gradients are compared too."""
        return ()

    @abstractmethod
    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Tensors:
        """The arguments by name and, for an op with gradients, `d<output>` for every output."""

    @abstractmethod
    def ours(self, x: Tensors) -> Tensors:
        """The call of `torchweld.ops`."""

    @abstractmethod
    def torch(self, x: Tensors) -> Tensors:
        """The same by torch alone, in the dtype of the inputs, as one would write it without torchweld."""

    @abstractmethod
    def reference(self, x: Tensors) -> Tensors:
        """The call of `torchweld.reference`."""

    def terms(self, x: Tensors) -> dict[str, float]:
        """By output, the size of the terms that cancel in it, for `parity`; from the float64 inputs."""
        return {}


def evaluate(case: Case, provider: Provider, x: Tensors) -> Tensors:
    """All outputs of `provider(x)` and, as `d<input>`, the gradients of the case's leaves."""
    leaves = {n: x[n].detach().requires_grad_() for n in case.leaves if n in x}
    outputs = provider({**x, **leaves})
    if not leaves:
        return outputs
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), [x[f"d{n}"] for n in outputs])
    return {n: t.detach() for n, t in outputs.items()} | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside the block torch fills every `empty` with NaN, so that an element which no kernel wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Small work gains nothing from torch's other threads, and waits long for them where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Oracle:
    """What is right for one case in one dtype: computed once, then asked about any number of kernels.

    Small cases are drawn several times and judged as one: the largest of a handful of rounding errors is a matter of
    luck, torch's as much as ours. A tensor's first index in a verdict is then the draw.
    """

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> None:
        self.case = case
        first = case.inputs(dtype, device, seed)
        numel = sum(t.numel() for t in first.values())
        draws = _DRAWS if numel < _SMALL else 1
        self.inputs = [first] + [case.inputs(dtype, device, seed + i) for i in range(1, draws)]
        self.threads = 1 if numel < _LARGE else torch.get_num_threads()
        wide = [{n: t.double() if t.is_floating_point() else t for n, t in x.items()} for x in self.inputs]
        with _threads(self.threads):
            self.torch = _stacked([evaluate(case, case.torch, x) for x in self.inputs])
            self.exact = _stacked([evaluate(case, case.reference, x) for x in wide])
            with torch.no_grad():
                terms = [case.terms(x) for x in wide]
        self.terms = {n: max(t[n] for t in terms) for n in terms[0]}

    def judge(self, provider: Provider | None = None, poison: bool = True) -> list[Parity]:
        """The verdict on every output and gradient of `provider`, or of the case's own `ours`.

        `poison` takes torch's deterministic algorithms, and ours: without it, those that `provider` itself asks for.
        """
        draws, threads = [], torch.get_num_threads()
        for x in self.inputs:
            with poisoned() if poison else nullcontext(), _threads(threads):
                draws.append(evaluate(self.case, provider or self.case.ours, x))
            threads = 1  # further draws of a small case: the other way through the kernels
        with _threads(self.threads):
            return judge(_stacked(draws), self.torch, self.exact, self.terms)

    def check(self, provider: Provider | None = None) -> list[Parity]:
        """As `judge`, but raises AssertionError on a miss."""
        return confirm(self.judge(provider), self.case.op, self.case.name)


def _stacked(draws: list[Tensors]) -> Tensors:
    return {n: torch.stack([d[n] for d in draws]) for n in draws[0]} if len(draws) > 1 else draws[0]


def ops() -> dict[str, tuple[Case, ...]]:
    """Every op that has kernels, with its cases."""
    from torchweld.testing.adamw import ADAMW  # noqa: PLC0415  (they import this file)
    from torchweld.testing.attention import ATTENTION  # noqa: PLC0415
    from torchweld.testing.cross_entropy import CROSS_ENTROPY  # noqa: PLC0415
    from torchweld.testing.gelu import GELU  # noqa: PLC0415
    from torchweld.testing.layer_norm import ADD_LAYER_NORM, ADD_RMS_NORM, LAYER_NORM, RMS_NORM  # noqa: PLC0415
    from torchweld.testing.paged_attention import PAGED_ATTENTION  # noqa: PLC0415
    from torchweld.testing.sgd import SGD  # noqa: PLC0415

    return {
        "attention": ATTENTION,
        "paged_attention": PAGED_ATTENTION,
        "layer_norm": LAYER_NORM,
        "add_layer_norm": ADD_LAYER_NORM,
        "rms_norm": RMS_NORM,
        "add_rms_norm": ADD_RMS_NORM,
        "gelu": GELU,
        "cross_entropy": CROSS_ENTROPY,
        "adamw": ADAMW,
        "sgd": SGD,
    }


def cases(op: str) -> tuple[Case, ...]:
    """The cases of one op; the first is small and ordinary."""
    return ops()[op]
