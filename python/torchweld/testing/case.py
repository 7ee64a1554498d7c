"""The class of a case, and the run of a case."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from torchweld.testing.parity import Parity, confirm, judge

Tensors = dict[str, Tensor]
Provider = Callable[[Tensors], Tensors]

# A case with fewer elements than the first is drawn several times. From the second on torch uses all threads.
_SMALL, _DRAWS, _LARGE = 1 << 17, 4, 1 << 22
# A miss is judged again over more draws, as many as have so many elements together: of a large output, too, a few rows
# or one outlier may decide.
_MORE_DRAWS, _MORE = 32, 1 << 25


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """One call of one op at one size. `regime` says in a few words which code the size reaches.

    Subclasses add sizes and flags, and implement the call three times: by torchweld, by torch and by the definition.
    Each takes the named inputs and returns the named outputs.
    """

    name: str
    regime: str
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)

    @property
    @abstractmethod
    def op(self) -> str:
        """The name of the op in tables and on the command line."""

    @property
    def leaves(self) -> tuple[str, ...]:
        """The inputs whose gradients are compared."""
        return ()

    @abstractmethod
    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Tensors:
        """The arguments by name and, for an op with gradients, `d<output>` for every output."""

    @abstractmethod
    def ours(self, x: Tensors) -> Tensors:
        """The call of `torchweld.ops`."""

    @abstractmethod
    def torch(self, x: Tensors) -> Tensors:
        """The same by torch alone, in the dtype of the inputs, as a user writes it without torchweld."""

    @abstractmethod
    def reference(self, x: Tensors) -> Tensors:
        """The call of `torchweld.reference`."""

    def terms(self, x: Tensors) -> Mapping[str, Tensor | float]:
        """For each output, the size of the terms that cancel in it, from the float64 inputs, for `parity`."""
        return {}

    def zeros(self, x: Tensors) -> Tensors:
        """For each output, where the definition is 0 for every input, for `parity`. Broadcasts to the output."""
        return {}


def evaluate(case: Case, provider: Provider, x: Tensors, inference: bool = False) -> Tensors:
    """All outputs of `provider(x)` and, unless `inference`, the gradients of the case's leaves as `d<input>`."""
    leaves = {} if inference else {n: x[n].detach().requires_grad_() for n in case.leaves if n in x}
    outputs = provider({**x, **leaves})
    if not leaves:
        return outputs
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), [x[f"d{n}"] for n in outputs])
    return {n: t.detach() for n, t in outputs.items()} | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside the block torch fills every `empty` with NaN, so that an element that no kernel wrote shows."""
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
    """The threads for a case. Small work gains nothing from more threads, and waits for them on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Oracle:
    """The right results of one case in one dtype. They are computed once and judge any number of kernels.

    Small cases are drawn several times and judged as one, because the largest of a few rounding errors is a matter of
    luck. The first index in a verdict is then the number of the draw.
    """

    def __init__(
        self,
        case: Case,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        seed: int = 0,
        inference: bool = False,
    ) -> None:
        self.case, self.dtype, self.device, self.seed, self.inference = case, dtype, device, seed, inference
        first = case.inputs(dtype, device, seed)
        numel = sum(t.numel() for t in first.values())
        self._more = min(_MORE_DRAWS, _MORE // max(numel, 1))
        self.threads = 1 if numel < _LARGE else torch.get_num_threads()
        self.inputs = [first]
        self._right: list[tuple[Tensors, Tensors, Tensors, Tensors]] = []
        self._draw(_DRAWS if numel < _SMALL else 1)

    def _draw(self, count: int) -> None:
        """Adds draws until there are `count`, each with torch's outputs, the exact ones, their terms and zeros."""
        case, have = self.case, len(self.inputs)
        self.inputs += [case.inputs(self.dtype, self.device, self.seed + i) for i in range(have, count)]
        with _threads(self.threads):
            for x in self.inputs[len(self._right) :]:
                wide = {n: t.double() if t.is_floating_point() else t for n, t in x.items()}
                found = (
                    evaluate(case, case.torch, x, self.inference),
                    evaluate(case, case.reference, wide, self.inference),
                )
                with torch.no_grad():
                    terms, zeros = (
                        {
                            n: torch.as_tensor(t, device=e.device).expand(e.shape)
                            for n, e in found[1].items()
                            if (t := of.get(n)) is not None
                        }
                        for of in (case.terms(wide), case.zeros(x))
                    )
                self._right.append((*found, terms, zeros))
            self.torch, self.exact, self.terms, self.zeros = map(_stacked, zip(*self._right, strict=True))

    def judge(self, provider: Provider | None = None, poison: bool = True) -> list[Parity]:
        """The verdict on every output and gradient of `provider`, or of the case's own `ours`.

        `poison` takes torch's deterministic algorithms, and ours: without it, those that `provider` itself asks for.
        """
        ours = self._evaluate(provider, poison, self.inputs)
        verdicts = self._verdicts(ours)
        if len(self.inputs) < self._more and any(1 < v.ratio < math.inf for v in verdicts):
            self._draw(self._more)
            ours += self._evaluate(provider, poison, self.inputs[len(ours) :])
            verdicts = self._verdicts(ours)
        return verdicts

    def _evaluate(self, provider: Provider | None, poison: bool, inputs: list[Tensors]) -> list[Tensors]:
        draws, threads = [], torch.get_num_threads()
        for x in inputs:
            with poisoned() if poison else nullcontext(), _threads(threads):
                draws.append(evaluate(self.case, provider or self.case.ours, x, self.inference))
            threads = 1  # further draws of a small case: the other way through the kernels
        return draws

    def _verdicts(self, ours: list[Tensors]) -> list[Parity]:
        with _threads(self.threads):
            return judge(_stacked(ours), self.torch, self.exact, self.terms, self.zeros)

    def check(self, provider: Provider | None = None) -> list[Parity]:
        """As `judge`, but raises AssertionError on a miss."""
        return confirm(self.judge(provider), self.case.op, self.case.name)


def _stacked(draws: Sequence[Tensors]) -> Tensors:
    return {n: torch.stack([d[n] for d in draws]) for n in draws[0]} if len(draws) > 1 else draws[0]
