"""A trial: a call, what must hold of it, and a short program that repeats it."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from torchweld.testing.case import Case, Oracle
from torchweld.testing.fuzz.edges import at_edges


class Skip(Exception):
    """Raised if torch itself refuses the draw."""


@dataclass(frozen=True, kw_only=True)
class Trial(ABC):
    """Subclasses have only fields that `source` can write."""

    @abstractmethod
    def check(self) -> None:
        """Raises if something is wrong. Raises Skip if there is nothing to try."""

    def imports(self) -> set[str]:
        return {f"from {type(self).__module__} import {type(self).__name__}"}

    def lines(self) -> list[str]:
        """The program after its imports."""
        return [f"trial = {source(self)}", "trial.check()"]

    def smaller(self) -> Iterator[Trial]:
        """Smaller trials: with an option less, or a smaller size."""
        yield from reduced(self)


@lru_cache(maxsize=1)  # shared by all instruction sets of a case
def _oracle(case: Case, dtype: torch.dtype, seed: int, inference: bool) -> Oracle:
    return Oracle(case, dtype, seed=seed, inference=inference)


@dataclass(frozen=True, kw_only=True)
class Judged(Trial):
    """A case held to the rule of exactness. `edge`: the kernels' memory ends, or begins, at an inaccessible page."""

    case: Case
    dtype: torch.dtype
    seed: int
    inference: bool = False
    edge: str = ""

    def check(self) -> None:
        try:
            oracle = _oracle(self.case, self.dtype, self.seed, self.inference)
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            raise Skip(str(error)) from error
        with at_edges(self.edge):
            oracle.check()

    def imports(self) -> set[str]:
        cls = type(self.case)
        found = {"from torchweld.testing import Oracle", f"from {cls.__module__} import {cls.__name__}"}
        return found | ({"from torchweld.testing.fuzz.edges import at_edges"} if self.edge else set())

    def lines(self) -> list[str]:
        inference = ", inference=True" if self.inference else ""
        oracle = f"oracle = Oracle(case, {self.dtype}, seed={self.seed}{inference})"
        checks = [f"with at_edges({self.edge!r}):", "    oracle.check()"] if self.edge else ["oracle.check()"]
        return [f"case = {source(self.case)}", oracle, *checks]

    def smaller(self) -> Iterator[Trial]:
        for flag in ({"edge": ""}, {"inference": False}):
            if any(getattr(self, n) != v for n, v in flag.items()):
                yield replace(self, **flag)
        for case in reduced(self.case):
            yield replace(self, case=case)


def source(value: Any) -> str:
    """Python code for `value`. Of a record only fields that differ from their defaults."""
    if is_dataclass(value) and not isinstance(value, type):
        given = [(f.name, getattr(value, f.name)) for f in fields(value) if getattr(value, f.name) != f.default]
        return f"{type(value).__name__}({', '.join(f'{n}={source(v)}' for n, v in given)})"
    if isinstance(value, float) and not math.isfinite(value):
        return f"float({str(value)!r})"
    if isinstance(value, tuple):
        return f"({', '.join(map(source, value))}{',' if len(value) == 1 else ''})"
    return repr(value)


def reduced(record: Any) -> Iterator[Any]:
    """Records with one field at its default, then with one size halved in every place."""
    for f in fields(record):
        value = getattr(record, f.name)
        if value != f.default and isinstance(f.default, (bool, int, float, str, tuple, type(None))):
            yield replace(record, **{f.name: f.default})
    sizes = [f.name for f in fields(record) if type(getattr(record, f.name)) is int and f.name != "seed"]
    for name in sizes:
        size = getattr(record, name)
        for less in sorted({1, size // 2, size - 1} - {0, -1, size}):
            tuples = {
                f.name: tuple(less if n == size else n for n in value)
                for f in fields(record)
                if isinstance(value := getattr(record, f.name), tuple) and size in value
            }
            yield replace(record, **{name: less, **tuples})
    for f in fields(record):
        value = getattr(record, f.name)
        if isinstance(value, tuple) and f.name not in ("bias", "dtypes") and len(value) > 1:
            yield from (replace(record, **{f.name: value[:i] + value[i + 1 :]}) for i in range(len(value)))


def program(trial: Trial, isa: str) -> str:
    """A program of a few lines that fails in the same way."""
    body = trial.lines()
    imports = trial.imports() | {"from torchweld import _cpu"}
    plain = [f"import {m}" for m in ("math", "torch") if any(re.search(rf"\b{m}\.", line) for line in body)]
    return "\n".join([*plain, *sorted(imports), f"_cpu.use_isa({isa!r})", *body])


def signature(error: BaseException) -> str:
    """The kind of failure in a few words, equal for all cases of one fault as far as can be seen."""
    text = str(error)
    if isinstance(error, AssertionError) and (found := re.match(r"\[\w+\] case '.*?', (\w+?)\d*: (.*)", text)):
        kind = "wrong in kind" if "wrong in kind" in found[2] else "misses the rule"
        return f"{found[1]} {kind}"
    return f"{type(error).__name__}: {re.sub(r'[-+]?[0-9][0-9.e+-]*', '#', text.splitlines()[0] if text else '')[:120]}"
