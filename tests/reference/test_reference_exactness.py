"""The definitions are what calls run on where no kernel serves, so in every dtype they are held to the rule as well."""

from __future__ import annotations

import pytest

from torchweld.testing import Oracle
from torchweld.testing.cases import ops

LARGE = 1 << 17  # elements: a definition takes what torch's operators take, and large cases reach no other code


@pytest.mark.slow
@pytest.mark.parametrize("op", list(ops()))
def test_the_definition_holds_the_rule(op: str) -> None:
    judged = 0
    for case in ops()[op]:
        if sum(t.numel() for t in case.inputs(case.dtypes[0]).values()) > LARGE:
            continue
        for dtype in case.dtypes:
            Oracle(case, dtype).check(case.reference)
            judged += 1
    assert judged >= 6
