"""Error bounds also hold where a GPU rounds otherwise than a CPU: approximate instructions, contracted sums."""

from __future__ import annotations

import os
import sys
from types import ModuleType

import pytest
import torch

from attention_cases import MODIFIERS, TILES
from emulation import build, sanitized
from torchweld import backend
from torchweld.testing import Case, Oracle

CASES = [(case, dtype) for case, dtype in sanitized.small_cases(1 << 12) if "attention" not in case.op]
IDS = [f"{case.op}: {case.name}-{str(dtype)[6:]}" for case, dtype in CASES]
ATTENTION = [
    *((each, torch.float32, 80) for each in MODIFIERS[:3]),
    *((each, torch.bfloat16, 80) for each in MODIFIERS[3:6]),
    *((each, torch.bfloat16, 90) for each in (*TILES[:1], *MODIFIERS[:2])),
]
WITH_ATTENTION = os.environ.get("TORCHWELD_CONTRACTED_ATTENTION") == "1"


def check(case: Case, dtype: torch.dtype) -> None:
    try:
        Oracle(case, dtype).check()
    except backend.NotServedError as refusal:
        pytest.skip(refusal.reason)


@pytest.mark.parametrize(("case", "dtype"), CASES, ids=IDS)
def test_approximations(case: Case, dtype: torch.dtype, emulated: ModuleType) -> None:
    """Each result of an approximate instruction is as far away as its documentation allows, or less."""
    form = getattr(case, "approximate", None) or getattr(case, "activation", None)  # of GELU; of a gated unit
    if form == "none" and dtype == torch.float32:
        pytest.skip("normcdff may be 5 units off, in torch's kernel too: beside torch on a CPU that is too much")
    emulated.set_machine(rounding=1)
    check(case, dtype)


@pytest.mark.parametrize(("case", "dtype", "capability"), ATTENTION, ids=lambda x: getattr(x, "name", str(x)))
def test_approximations_of_attention(
    case: Case, dtype: torch.dtype, capability: int, emulated: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[Case.__module__], "_DRAWS", 1)  # products are slow here
    emulated.set_machine(capability=capability, rounding=1)
    check(case, dtype)


@pytest.fixture
def contracted(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The kernels with products and sums contracted, in the place of the others."""
    if not build.contracts():
        pytest.skip("this processor has no contracted instructions")
    module = build.load(contracted=build.Contracted(attention=WITH_ATTENTION, others=True))
    assert module is not emulated
    monkeypatch.setitem(backend.kernels, "cpu", module)
    return module


@pytest.mark.usefixtures("contracted")
@pytest.mark.parametrize(("case", "dtype"), CASES, ids=IDS)
def test_contracted_sums(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.skipif(not WITH_ATTENTION, reason="compiles for minutes; TORCHWELD_CONTRACTED_ATTENTION=1 asks for it")
@pytest.mark.parametrize(("case", "dtype", "capability"), ATTENTION, ids=lambda x: getattr(x, "name", str(x)))
def test_contracted_sums_of_attention(
    case: Case, dtype: torch.dtype, capability: int, contracted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[Case.__module__], "_DRAWS", 1)
    contracted.set_machine(capability=capability)
    try:
        check(case, dtype)
    finally:
        contracted.set_machine()
