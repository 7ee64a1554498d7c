"""The rule of exactness and its cases, shared by the tests, `torchweld check` and `torchweld bench`."""

from torchweld.testing.case import Case, Oracle, evaluate, poisoned
from torchweld.testing.cases import cases, ops
from torchweld.testing.parity import Parity, assert_parity, confirm, judge, parity

__all__ = [
    "Case",
    "Oracle",
    "Parity",
    "assert_parity",
    "cases",
    "confirm",
    "evaluate",
    "judge",
    "ops",
    "parity",
    "poisoned",
]
