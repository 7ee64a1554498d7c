"""The rule of exactness and its cases, shared by the tests, `torchweld check` and `torchweld bench`."""

from torchweld.testing.cases import Case, Oracle, cases, evaluate, ops, poisoned
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
