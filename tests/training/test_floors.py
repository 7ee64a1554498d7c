"""What the programs reach on real data, as in the README, held to looser floors: minutes each, so only when asked for.

TORCHWELD_TEST_DATA names the folder that has them: ~/.cache/torchweld/data after `torchweld data get` for each.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from commands import Run

pytestmark = [pytest.mark.slow, pytest.mark.data]


def reached(command: Run, program: str, data: str) -> dict[str, dict[str, float]]:
    """The scores of a run with the default config."""
    folder = Path(os.environ.get("TORCHWELD_TEST_DATA", "nowhere"), data)
    if not folder.exists():
        pytest.skip(f"trains for minutes on {data}, which is not in TORCHWELD_TEST_DATA")
    options = ("--device", "cpu", "--no-keep-memory", "--out", "run")
    code, _, error = command("train", program, "--data", folder.absolute(), *options)
    assert code == 0, error
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


def test_seq2seq(command: Run) -> None:
    found = reached(command, "seq2seq", "home-assistant/homeassistant-2026.2.3-py3-none-any.whl")
    assert found["seq2seq"]["chrF"] >= 38.0 > found["translation memory"]["chrF"] > found["the source itself"]["chrF"]
    assert found["seq2seq"]["exact"] >= 0.04 > found["translation memory"]["exact"]


def test_speech(command: Run) -> None:
    """spoken-words is what `torchweld train speech` makes where espeak-ng is."""
    found = reached(command, "speech", "spoken-words")
    assert found["AST"]["accuracy"] > 0.12 > 5 * found["most frequent word"]["accuracy"]
