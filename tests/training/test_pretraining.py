"""`torchweld train bert`: what pairs and masks are made of, that it learns, resumes to the bit and is fine-tuned."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import Run, check_resuming
from torchweld.models import bert
from torchweld.training import corpus, pretraining
from torchweld.training.programs import PROGRAMS
from torchweld.training.settings import Settings

FILES = ("config.json", "model.safetensors", "optimizer.safetensors", "tokenizer.json", "training.json")


@pytest.fixture
def data(home: Path) -> pretraining.Text:
    """Thirty documents; the words of each have its number in them."""
    for i in range(30):
        words = [f"w{i}x{j}" for j in range(40 + i)]
        (home / f"{i}.txt").write_text(" ".join(words))
    settings = Settings(
        steps=1,
        batch_size=8,
        learning_rate=1.0,
        config="tiny",
        seed=0,
        data=[str(home / f"{i}.txt") for i in range(30)],
    )
    return PROGRAMS["bert"].data(settings, bert.CONFIGS["tiny"])


def test_pairs_are_neighbours_or_not(data: pretraining.Text) -> None:
    rng = np.random.default_rng(0)
    whole = data.train.tokens.tolist()
    near, lengths = 0, []
    separator = corpus.special_token(data.tokenizer, corpus.SEPARATOR)
    for _ in range(300):
        pair = data.train.pair(rng, 61)
        joined = [*pair.first, *pair.second]
        lengths.append(len(joined))
        assert separator not in joined and min(len(pair.first), len(pair.second)) >= 4
        follows = any(whole[i : i + len(joined)] == joined for i in range(len(whole)))
        assert follows or pair.random
        near += not pair.random
    assert 110 < near < 190 and max(lengths) == 61 and sum(length < 61 for length in lengths) > 10


def test_masks(data: pretraining.Text) -> None:
    rng = np.random.default_rng(0)
    pairs = [data.train.pair(rng, 61) for _ in range(200)]
    batch = data.batch(pairs, rng)
    tokens, types, bounds, rows, words, follows = batch.tensors
    start, end, mask = data.marks
    original = tokens.clone()
    original[rows] = words
    for pair, a, b in zip(pairs, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        assert original[a:b].tolist() == [start, *pair.first, end, *pair.second, end]
        assert types[a:b].tolist() == [0] * (len(pair.first) + 2) + [1] * (len(pair.second) + 1)
    assert follows.tolist() == [int(pair.random) for pair in pairs]
    count = len(rows)
    assert count == pytest.approx(0.15 * (len(tokens) - 3 * len(pairs)), rel=0.03)
    assert (tokens[rows] == mask).double().mean().item() == pytest.approx(0.8, abs=0.04)
    assert (tokens[rows] == words).double().mean().item() == pytest.approx(0.1, abs=0.03)
    untouched = torch.ones(len(tokens), dtype=torch.bool).index_fill(0, rows, False)
    assert (tokens[untouched] != mask).all()
    assert batch.weights == {"mlm": count, "nsp": 200} and batch.count == len(tokens)


def test_a_batch_is_the_same_in_any_number_of_parts(data: pretraining.Text) -> None:
    settings = Settings(steps=1, batch_size=8, learning_rate=1.0, config="tiny", seed=0, data=None)
    whole, *parts = (PROGRAMS["bert"].batches(data, settings, bert.CONFIGS["tiny"], 3, n) for n in (1, 2, 4))
    for each in parts:
        for index in (0, 1, 4, 5):  # tokens, segments, hidden words, which pairs are neighbours
            assert torch.equal(torch.cat([batch.tensors[index] for batch in each]), whole[0].tensors[index])


def test_prose_of_the_standard_library() -> None:
    documents = corpus.standard_library_prose()
    assert sum(map(len, documents)) > 1_500_000
    joined = "\n".join(documents)
    assert "Command-line parsing library" in joined and "class Action(" not in joined
    assert 'The "try" statement specifies' in joined


@pytest.fixture
def train(data: pretraining.Text, home: Path, command: Run) -> Run:
    """Runs `torchweld train bert --config tiny` on thirty files."""
    files = sorted(str(path) for path in home.glob("*.txt"))
    options = ("--config", "tiny", "--device", "cpu", "--no-keep-memory", "--data", *files)
    return lambda *words: command("train", "bert", *options, *words)


@pytest.mark.slow
def test_learns_beside_stock_and_is_fine_tuned(train: Run, command: Run, home: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="loads the checkpoint with transformers, a test extra")
    code, out, error = train("--steps", 30, "--compare", "torch", "--out", "run")
    assert code == 0, error
    assert "they agree" in out and "masked, right" in out and "mlm" in out and "nsp" in out
    losses = json.loads(Path("run/checkpoint-30/training.json").read_text())["losses"]
    assert losses[-1] < losses[0] - 0.3
    assert transformers.BertForPreTraining.from_pretrained("run/checkpoint-30").config.vocab_size == 512
    rows = "".join(f"w{i % 30}x{i % 7} w{i % 30}x1 plain text {i}\t{i % 2}\n" for i in range(60))
    (home / "rows.tsv").write_text(rows)
    words = ("--checkpoint", "run", "--data", "rows.tsv", "--text", 1, "--label", 2, "--steps", 2, "--device", "cpu")
    code, out, error = command("fine-tune", "classify", *words, "--no-keep-memory", "--out", "tuned")
    assert code == 0 and "bag of words" in out, error


@pytest.mark.slow
def test_resume_continues_bit_for_bit(train: Run, command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    check_resuming(train, partial(command, "train", "bert"), monkeypatch, FILES)


@pytest.fixture
def checkpoint(data: pretraining.Text) -> Path:
    """A BERT of random weights for the thirty documents."""
    torch.manual_seed(0)
    model = bert.BERTForPreTraining(bert.CONFIGS["tiny"])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    out = Path("bert")
    out.mkdir()
    data.tokenizer.save("bert/tokenizer.json")
    (out / "config.json").write_text(json.dumps(model.config.to_hugging_face()))
    save_file({name: t.contiguous() for name, t in model.to_hugging_face().items()}, out / "model.safetensors")
    return out


def test_fill_mask_is_the_pipeline_of_transformers(data: pretraining.Text, checkpoint: Path, command: Run) -> None:
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers' BertForMaskedLM")
    text = "w1x1 [MASK] w3x4 [MASK]"
    for names in (None, "masked"):
        if names:  # the weights of a BertForMaskedLM lack the pooler and the other head
            state = load_file(checkpoint / "model.safetensors")
            kept = {name: t for name, t in state.items() if "pooler" not in name and "seq_relationship" not in name}
            save_file(kept, checkpoint / "model.safetensors")
        code, out, _ = command("fill-mask", "--checkpoint", checkpoint, text, "--top", 3, "--json", "--device", "cpu")
        assert code == 0
        found = json.loads(out)
        assert found["text"] == text and [len(words) for words in found["masks"]] == [3, 3]
    ids = torch.tensor([data.tokenizer.encode(text).ids])
    theirs = transformers.BertForMaskedLM.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        best = theirs(ids).logits[0, ids[0] == data.marks[2]].softmax(1).topk(3)
    for words, numbers, values in zip(found["masks"], best.indices.tolist(), best.values.tolist(), strict=True):
        assert [word["word"] for word in words] == [data.tokenizer.id_to_token(number) for number in numbers]
        assert [word["probability"] for word in words] == pytest.approx(values, abs=1e-4)


def test_fill_mask_refuses(checkpoint: Path, command: Run) -> None:
    for text, message in (
        ("no mask", "TEXT: expected 1 to 20 times [MASK], but got 0 in 'no mask'"),
        ("[MASK] " * 21, "but got 21"),
        ("w1x1 " * 70 + "[MASK]", "at most max_position_embeddings = 64 tokens"),
    ):
        code, out, error = command("fill-mask", "--checkpoint", checkpoint, text, "--device", "cpu")
        assert code == 2 and out == "" and message in error
    state = load_file(checkpoint / "model.safetensors")
    kept = {name: t for name, t in state.items() if name.startswith("bert.")}
    save_file(kept, checkpoint / "model.safetensors")
    code, _, error = command("fill-mask", "--checkpoint", checkpoint, "[MASK]", "--device", "cpu")
    assert code == 2 and "trained on masked words" in error


def test_too_little_text_is_refused(command: Run, home: Path) -> None:
    (home / "short.txt").write_text("a few words, not enough to learn from\n")
    words = ("--config", "tiny", "--device", "cpu", "--no-keep-memory", "--data", "short.txt")
    code, _, error = command("train", "bert", *words)
    assert code == 2 and "text: expected at least 64 tokens for training, but got" in error
    assert not Path("torchweld-bert").exists()
