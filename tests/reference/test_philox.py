"""The Philox generator: the published vectors, and what a dropout mask promises. The kernels' masks are tested with
the ops that have them."""

from __future__ import annotations

import pytest
import torch

from torchweld.reference.philox import draw_seed, dropout_factors, philox


def words(seed: int, row: int, block: int) -> list[int]:
    return philox(torch.tensor([seed]), torch.tensor(row), torch.tensor(block)).tolist()


def python_philox(seed: int, row: int, block: int) -> list[int]:
    """In Python's own integers, which do not overflow."""
    low = 0xFFFFFFFF
    k, c = [seed & low, seed >> 32 & low], [block, row & low, row >> 32 & low, 0]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & low, (a >> 32) ^ c[3] ^ k[1], a & low]
        k = [k[0] + 0x9E3779B9 & low, k[1] + 0xBB67AE85 & low]
    return c


def test_known_answer() -> None:
    # Random123's known-answer file, philox4x32-10: counter and key of zeros.
    assert words(0, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("seed", [1, -1, 2**62 + 12345, -(2**63)])
@pytest.mark.parametrize(("row", "block"), [(0, 1), (1, 0), (2**40 + 7, 2**32 - 1), (2**32 - 1, 5)])
def test_equals_exact_integers(seed: int, row: int, block: int) -> None:
    assert words(seed, row, block) == python_philox(seed, row, block)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_a_mask_drops_its_share(p: float) -> None:
    factors = dropout_factors(torch.tensor([7]), 400, 401, p)
    kept = factors != 0
    assert factors[kept].unique().tolist() == [1 / (1 - p)]
    # Five standard deviations of the share of 160 thousand independent draws.
    assert abs(float(kept.double().mean()) - (1 - p)) < 5 * (p * (1 - p) / kept.numel()) ** 0.5
    # Rows and columns are alike as chance has it, and no two are the same.
    assert kept.unique(dim=0).shape[0] == 400 and kept.unique(dim=1).shape[1] == 401


def test_rows_by_number_and_the_extremes() -> None:
    seed = torch.tensor([3])
    some = dropout_factors(seed, torch.tensor([5, 2]), 9, 0.3)
    assert torch.equal(some, dropout_factors(seed, 6, 9, 0.3)[[5, 2]])
    assert torch.equal(dropout_factors(seed, 4, 4, 0.0), torch.ones(4, 4, dtype=torch.float64))
    assert not dropout_factors(seed, 4, 4, 1.0).any()


def test_seeds_come_from_torchs_generator() -> None:
    torch.manual_seed(5)
    first, second = draw_seed(torch.device("cpu")), draw_seed(torch.device("cpu"))
    torch.manual_seed(5)
    assert torch.equal(first, draw_seed(torch.device("cpu"))) and not torch.equal(first, second)
