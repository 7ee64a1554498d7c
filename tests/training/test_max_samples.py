"""`--max-samples`: each program learns from the first N samples for training; what it is tested on stays the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from commands import Run
from pictures import write_folders
from tones import WORDS, write_words
from torchweld.errors import UserError
from torchweld.training.programs import PROGRAMS
from torchweld.training.settings import Settings


def settings(name: str, data: Sequence[Path | str], samples: int | None) -> Settings:
    """Those of `train NAME --config tiny --max-samples`."""
    program = PROGRAMS[name]
    return Settings(
        **asdict(program.recipes["tiny"]),
        program=name,
        config="tiny",
        seed=0,
        data=[str(path) for path in data],
        options=dict(program.defaults),
        max_samples=samples,
    )


def read(name: str, data: Sequence[Path | str], samples: int | None) -> Any:
    program = PROGRAMS[name]
    return program.data(settings(name, data, samples), program.configs["tiny"])


@pytest.mark.parametrize("name", ["gpt2", "gpt3"])
def test_of_running_text_as_much_as_sequences_take(name: str, text: str) -> None:
    whole, part, one = (read(name, [text], n) for n in (None, 7, 1))
    context = PROGRAMS[name].configs["tiny"].n_positions
    assert len(part.train) == 7 * context + 1
    assert torch.equal(part.train, whole.train[: len(part.train)])
    assert torch.equal(part.validation, whole.validation) and part.digest == whole.digest
    inputs, targets = one.batch(3, context, seed=0, step=5)
    assert torch.equal(inputs, whole.train[None, :context].expand(3, -1))
    assert torch.equal(targets, whole.train[None, 1 : context + 1].expand(3, -1))
    assert len(read(name, [text], 10**9).train) == len(whole.train)


def test_of_documents_as_many_as_have_the_tokens(home: Path) -> None:
    names = [f"{i}.txt" for i in range(60)]
    for i, name in enumerate(names):
        (home / name).write_text(" ".join(f"word{(i * j) % 97}" for j in range(3 + 7 * (i % 9))))
    whole = read("bert", names, None)
    longest = PROGRAMS["bert"].configs["tiny"].max_position_embeddings
    for samples in (1, 3, 5):
        part = read("bert", names, samples)
        documents = part.train
        assert samples * longest <= documents.lengths.sum() < samples * longest + 8
        count = len(documents.starts)
        assert documents.starts.tolist() == whole.train.starts[:count].tolist()
        assert documents.lengths[:-1].tolist() == whole.train.lengths[: count - 1].tolist()
        end = documents.starts[-1] + documents.lengths[-1]
        assert documents.tokens.tolist() == whole.train.tokens[:end].tolist()
        draw = np.random.default_rng(0)
        for pair in (documents.pair(draw, 20) for _ in range(200)):
            assert len(pair.first) > 0 and len(pair.second) > 0
        assert part.validation.tokens.tolist() == whole.validation.tokens.tolist()
    assert read("bert", names, 10**9).train.lengths.tolist() == whole.train.lengths.tolist()


def test_of_pairs_the_first(home: Path) -> None:
    (home / "pairs.tsv").write_text("".join(f"text number {i}\tText Nummer {i}\n" for i in range(300)))
    whole, part = (read("seq2seq", ["pairs.tsv"], n) for n in (None, 20))
    assert part.training.pairs == whole.training.pairs[:20]
    assert part.training.sources == whole.training.sources[:20]
    assert part.training.targets == whole.training.targets[:20]
    assert part.test.pairs == whole.test.pairs and part.validation.pairs == whole.validation.pairs


@pytest.mark.parametrize("name", ["vit", "vae"])
def test_of_images_each_class_in_turn(home: Path, name: str) -> None:
    folder = write_folders(home / "folders")
    whole, part = (read(name, [folder], n) for n in (None, 9))
    labels = whole.training.labels
    first = [int(index) for label in (0, 1) for index in (labels == label).nonzero()[:5, 0]]
    assert sorted(part.training.labels.tolist()) in ([0] * 5 + [1] * 4, [0] * 4 + [1] * 5)
    rows = {row.numpy().tobytes() for row in whole.training.pixels[first]}
    assert all(row.numpy().tobytes() in rows for row in part.training.pixels)
    assert torch.equal(part.test.pixels, whole.test.pixels)
    with pytest.raises(UserError, match="--max-samples: expected at least 2, an image of each class, but got 1"):
        read(name, [folder], 1)


def test_of_recordings_each_word_in_turn(home: Path) -> None:
    folder = write_words(home / "words")
    whole, part = (read("speech", [folder], n) for n in (None, 7))
    assert torch.bincount(part.training.labels).tolist() == [3, 2, 2]
    assert set(part.training.names) < set(whole.training.names)
    assert torch.equal(part.test.waves, whole.test.waves) and part.labels == tuple(WORDS)
    with pytest.raises(UserError, match="--max-samples: expected at least 3, a recording of each word, but got 2"):
        read("speech", [folder], 2)


def test_of_users_the_first(home: Path) -> None:
    rows = [(user, (user * 5 + i) % 23, i) for user in range(40) for i in range(6)]
    (home / "ratings.csv").write_text("user,item,time\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    whole, part = (read("recommender", ["ratings.csv"], n) for n in (None, 10))
    assert part.training == whole.training[:10] and part.histories == whole.histories
    program = PROGRAMS["recommender"]
    seen = set()
    for step in range(20):
        (batch,) = program.batches(part, settings("recommender", [], 10), program.configs["tiny"], step, 1)
        seen |= {tuple(row.tolist()) for row in batch.tensors[1]}
    assert seen == {tuple(history) for history in part.training}


def test_a_run_says_it_and_keeps_it(train: Run, command: Run) -> None:
    code, out, error = train("--steps", 1, "--max-samples", 5, "--out", "run")
    assert code == 0 and "samples: of those for training the first 5 at most (--max-samples)" in out, error
    assert "321 tokens for training" in out
    assert json.loads(Path("run/checkpoint-1/training.json").read_text())["settings"]["max_samples"] == 5
    code, out, error = command("train", "gpt2", "--device", "cpu", "--resume", "run", "--steps", 2)
    assert code == 0 and "321 tokens for training" in out, error
    code, _, error = command("train", "gpt2", "--resume", "run", "--max-samples", 6)
    assert code == 2 and "--max-samples: expected 5, with which the run was started, but got 6" in error
    code, _, error = train("--max-samples", 0)
    assert code == 2 and "--max-samples: expected a whole number of at least 1, but got '0'" in error
