"""What the programs reach on real data, as in the README, held to looser floors: minutes each, so only when asked for.

TORCHWELD_FLOORS=1 pytest tests/training/test_floors.py, after `torchweld data get` for each data set.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from commands import Run
from torchweld.errors import UserError
from torchweld.training import packages

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "TORCHWELD_FLOORS" not in os.environ, reason="trains for minutes; TORCHWELD_FLOORS=1 asks for it"
    ),
]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of the test's own, and the user's cache, where the data are."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def reached(command: Run, program: str, data: str) -> dict[str, dict[str, float]]:
    """The scores of a run with the default config."""
    try:
        packages.find(data)
    except UserError as error:
        pytest.skip(str(error))
    code, _, error_text = command("train", program, "--device", "cpu", "--no-keep-memory", "--out", "run")
    assert code == 0, error_text
    return json.loads(Path("run/scores.json").read_text())


def test_vae(command: Run) -> None:
    found = reached(command, "vae", "fashion-mnist")
    assert found["VAE"]["bits per number"] <= 3.5 and found["VAE"]["squared error"] <= 0.0125
    others = [scores["bits per number"] for scores in found.values() if "bits per number" in scores]
    assert min(others) == found["VAE"]["bits per number"]


def test_vit(command: Run) -> None:
    found = reached(command, "vit", "fashion-mnist")
    assert found["ViT"]["accuracy"] > found["logistic regression"]["accuracy"] > 0.83


def test_recommender(command: Run) -> None:
    found = reached(command, "recommender", "ml-100k")
    assert found["GPT-2"]["HR@10"] > found["Markov chain"]["HR@10"] > found["popularity"]["HR@10"]
