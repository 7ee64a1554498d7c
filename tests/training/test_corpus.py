"""Text to tokens: the standard library, the tokenizer, the split, the windows, the cache."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE

from commands import Run
from torchweld.training import corpus


def test_standard_library_text(home: Path) -> None:
    documents = corpus.standard_library()
    assert sum(map(len, documents)) > 5_000_000
    assert Path(argparse.__file__).read_text() in documents
    assert topics["try"] in documents
    assert not any("decoding_table = (" in d for d in documents)  # the tables of encodings/


def test_tokenizer_takes_any_text() -> None:
    tokenizer = corpus.train_tokenizer(["def f(x):\n    return x\n" * 50], 300)
    for sample in ("def f(x):", "żółć 漢字 🙂\r\n\t\x07", ""):
        assert tokenizer.decode(tokenizer.encode(sample).ids) == sample
    assert corpus.end_of_text(tokenizer) == 0


def test_corpus_split_windows_and_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [f"document {i} says {i * i}\n" * 20 for i in range(30)]
    text = corpus.load_corpus(list(documents), 300)
    whole = torch.cat([text.train, text.validation])
    assert len(text.validation) == len(whole) // 10
    decoded = text.tokenizer.decode(whole.tolist(), skip_special_tokens=False).split(corpus.END)
    assert sorted(decoded) == sorted(["", *documents])

    inputs, targets = text.batch(4, 16, seed=1, step=5)
    assert inputs.shape == targets.shape == (4, 16) and torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(text.batch(4, 16, 1, 5)[0], inputs)
    assert not torch.equal(text.batch(4, 16, 1, 6)[0], inputs)
    assert not torch.equal(text.batch(4, 16, 2, 5)[0], inputs)

    with monkeypatch.context() as patch:
        patch.setattr(corpus, "train_tokenizer", None)  # the second time nothing is trained
        again = corpus.load_corpus(list(documents), 300)
    assert torch.equal(again.train, text.train) and again.digest == text.digest
    (cached,) = corpus.cache_directory().iterdir()
    cached.write_bytes(cached.read_bytes()[:100])
    assert torch.equal(corpus.load_corpus(list(documents), 300).train, text.train)


def test_every_training_token_can_be_drawn() -> None:
    text = corpus.Corpus(Tokenizer(BPE()), "", torch.arange(40), torch.arange(40))
    seen = torch.cat([torch.cat(text.batch(8, 8, 0, step)).flatten() for step in range(100)])
    assert torch.equal(seen.unique(), torch.arange(40))
    validation = torch.cat([torch.cat(b).flatten() for b in text.validation_batches(2, 8, 1000)])
    assert validation.min() == 0 and validation.max() == 39


def test_unigram_entropy() -> None:
    uniform = torch.arange(64).repeat(3)[None]
    assert corpus.unigram_entropy([(uniform, uniform)]) == pytest.approx(math.log(64))
    skewed = torch.tensor([[0, 0, 0, 1]])
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert corpus.unigram_entropy([(skewed, skewed)]) == pytest.approx(expected)


def test_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert corpus.cache_directory() == Path("/somewhere/torchweld")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert corpus.cache_directory() == Path.home() / ".cache/torchweld"


def test_a_cache_that_cannot_be_written_does_no_harm(home: Path, train: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "file"))
    assert train("--steps", 2, "--out", "run")[0] == 0
