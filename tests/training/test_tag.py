"""`torchweld fine-tune tag` and `tag`: CoNLL's files and scores, long sentences, learning, resuming, and refusals."""

from __future__ import annotations

import io
import json
import random
import re
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from commands import Run, check_resuming, tiny_bert
from torchweld.training import checkpoint, scores, tagged
from torchweld.training.tagged import Sentence, Sentences
from torchweld.training.tuning import outputs

NAMES = ["Paris", "Sydney", "Florence", "Austin", "Chester"]  # of people and of places alike
REST = ["we", "they", "walked", "then", "the", "old", "house", "near", "a", "bridge", "and", "people", "slowly"]
FILES = ("config.json", "model.safetensors", "optimizer.safetensors", "tokenizer.json", "training.json")
LABELS = ["B-LOC", "B-PER", "I-PER", "O"]


def sentence(draw: random.Random) -> Sentence:
    """Names after "in" are places, those after "with" people, who may have a second name; not both in one sentence."""
    words, tags = [], []
    place = draw.random() < 0.5
    for _ in range(draw.randint(1, 3)):
        filler = draw.choices(REST, k=draw.randint(1, 4))
        name = [draw.choice(NAMES)] + ([] if place else draw.choice([[], ["Berg"], ["Jones"]]))
        words += [*filler, "in" if place else "with", *name]
        tags += ["O"] * (len(filler) + 1) + (["B-LOC"] if place else ["B-PER", "I-PER"][: len(name)])
    return Sentence((*words, "."), (*tags, "O"))


def conll(sentences: list[Sentence]) -> str:
    """With columns between, as in CoNLL-2003."""
    rows = ["\n".join(f"{word} X Y {tag}" for word, tag in zip(s.words, s.tags, strict=True)) for s in sentences]
    return "-DOCSTART- -X- -X- O\n\n" + "\n\n".join(rows) + "\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BERT of random weights and 400 sentences, and 30 for the test."""
    folder, draw = tmp_path_factory.mktemp("made"), random.Random(0)
    sentences = [sentence(draw) for _ in range(400)]
    tiny_bert(folder / "bert", [each.text for each in sentences])
    (folder / "all.txt").write_text(conll(sentences))
    (folder / "test.txt").write_text(conll([sentence(draw) for _ in range(30)]))
    return folder


@pytest.fixture
def tune(made: Path, command: Run) -> Run:
    """Runs `torchweld fine-tune tag` on the sentences."""
    options = ("--checkpoint", made / "bert", "--data", made / "all.txt", "--device", "cpu", "--no-keep-memory")
    return lambda *words: command("fine-tune", "tag", *options, *words)


@pytest.mark.slow
def test_learns_and_tags(made: Path, tune: Run, command: Run, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="loads the checkpoint with transformers, a test extra")
    code, out, error = tune("--epochs", 12, "--learning-rate", 3e-3, "--test", made / "test.txt", "--out", "run")
    assert code == 0, error
    assert "/ 30 for training, validation and test" in out and "4 tags" in out
    assert "the most wrong" in out and "kinds of entities one by one" in out
    found = json.loads(Path("run/scores.json").read_text())
    assert found["O for all"]["F1 of entities"] == 0.0
    assert found["BERT"]["F1 of entities"] > found["each word's most frequent tag"]["F1 of entities"] + 0.2
    best = checkpoint.best(Path("run"))
    assert best is not None

    text = "We walked with Paris Berg slowly. The old house"
    tag = ("tag", "--checkpoint", "run", "--device", "cpu")
    code, out, error = command(*tag, text, "", "we walked in Paris", "--json")
    assert code == 0, error
    line, nothing, place = (json.loads(each) for each in out.splitlines())
    assert nothing == {"text": "", "words": [], "entities": []}
    assert [(e["kind"], e["text"]) for e in line["entities"]] == [("PER", "Paris Berg")]
    assert [(e["kind"], e["start"], e["end"]) for e in place["entities"]] == [("LOC", 13, 18)]
    assert all(text[w["start"] : w["end"]] == w["word"] and 0 < w["probability"] <= 1 for w in line["words"])
    assert [w["word"] for w in line["words"]][5:7] == ["slowly", "."]

    (home / "lines.txt").write_text(f"{text}\n\n{text}\n")
    code, out, _ = command(*tag, "--file", "lines.txt")
    shown = "".join(f"{w['word']}\t{w['tag']}\n" for w in line["words"])
    assert code == 0 and out == f"{shown}\n\n{shown}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    code, out, _ = command(*tag, "--spaced")
    assert code == 0 and "slowly.\tO\n" in out

    theirs = transformers.AutoModelForTokenClassification.from_pretrained(best).eval()
    tokenizer = Tokenizer.from_file(str(best / "tokenizer.json"))
    for words, meant in (("we walked in Paris", "B-LOC"), ("we walked with Paris", "B-PER")):
        with torch.no_grad():
            logits = theirs(torch.tensor([tokenizer.encode(words).ids])).logits[0]
        assert theirs.config.id2label[int(logits[-2].argmax())] == meant


@pytest.mark.slow
def test_compares(tune: Run) -> None:
    code, out, error = tune("--steps", 6, "--compare", "torch", "--out", "run")
    assert code == 0, error
    assert "they agree" in out and "frequencies of the tags" in Path("run/report.html").read_text()


@pytest.mark.slow
def test_resume_continues_bit_for_bit(tune: Run, command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def again(*words: object) -> tuple[int, str, str]:
        return command("fine-tune", "tag", "--no-keep-memory", *words)

    check_resuming(tune, again, monkeypatch, FILES, ("--max-samples", 90))
    code, _, error = again("--resume", "broken", "--label", 2)
    assert code == 2 and "--label: expected 'last', with which the run was started, but got '2'" in error
    code, _, error = command("classify", "--checkpoint", "broken", "--device", "cpu")
    assert code == 2 and "expected a model that labels texts, but got one that tags words" in error


# ---- Files and sequences


def test_files(home: Path) -> None:
    (home / "a.txt").write_text("# text = Anna ran\nAnna NNP B-PER\nran VBD O\n\n\n# O\n. . O", newline="")
    (home / "b.tsv").write_text("O\tNew York\r\nB-LOC\tRome\r\n \r\n", newline="")
    first, second = tagged.read_sentences(["a.txt"], "1", "last")
    assert (first.words, first.tags, first.place) == (("Anna", "ran"), ("B-PER", "O"), "a.txt, line 2")
    assert (second.words, second.tags) == (("#", "."), ("O", "O"))  # a word as any, without a "="
    (third,) = tagged.read_sentences(["b.tsv"], "2", "1")
    assert (third.words, third.tags) == (("New York", "Rome"), ("O", "B-LOC"))
    assert tagged.digest([first, second]) != tagged.digest([first, third])


def test_a_long_sentence_is_cut_between_words(made: Path) -> None:
    tokenizer = Tokenizer.from_file(str(made / "bert/tokenizer.json"))
    tokenizer.no_padding()
    words = ("Paris", "bridge", "x" * 30, "\x01", "Sydney", "y" * 9) * 4
    tags = ("B-PER", "O", "O", "O", "B-LOC", "O") * 4
    data = Sentences([Sentence(words, tags), Sentence(("we",), ("O",))], tokenizer, 16, LABELS)
    assert max(data.lengths) <= 16 and len(data) > 4
    seen = [(piece.sentence, word) for piece in data.pieces for word in piece.places]
    assert seen == [(0, i) for i in range(24) if words[i] != "\x01"] + [(1, 0)]
    tokens, types, bounds, places, numbers = data.batch(range(len(data))).tensors
    assert len(tokens) == bounds[-1] == sum(data.lengths) and not types.any()
    assert [LABELS[number] for number in numbers] == [tags[word] for sentence, word in seen if sentence == 0] + ["O"]
    firsts = [tokenizer.id_to_token(int(token)) for token in tokens[places]]
    assert firsts[:2] == ["paris", "bridge"] and firsts[-1] == "we"

    class Model(torch.nn.Module):
        """Says B-LOC of "paris", else O."""

        per_token = True

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, tokens: torch.Tensor, types: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
            place = tokens.eq(int(tokenizer.token_to_id("paris") or 0)).float()
            return torch.stack((place, 0 * place, 0 * place, 1 - place), dim=1) * 5

    found = data.tags(Model(), 2, nullcontext(), "none")
    assert [tag.label for tag in found[0]] == ["B-LOC", "O", "O", "none", "O", "O"] * 4
    assert [len(each) for each in outputs(Model(), data, 3, nullcontext())] == data.lengths


# ---- Scores


def test_entities_by_hand() -> None:
    def found(tags: str) -> list[tuple[str, int, int]]:
        return sorted(scores.entities(tags.split()), key=lambda entity: entity[1])

    assert found("B-PER I-PER O B-LOC B-LOC") == [("PER", 0, 2), ("LOC", 3, 4), ("LOC", 4, 5)]
    assert found("O I-PER I-PER I-LOC O I-PER") == [("PER", 1, 3), ("LOC", 3, 4), ("PER", 5, 6)]  # IOB1
    assert found("S-PER B-LOC I-LOC E-LOC I-LOC") == [("PER", 0, 1), ("LOC", 1, 4), ("LOC", 4, 5)]  # IOBES
    assert found("O O") == found("") == []

    # Four entities are meant and four said, of which two are right; one is too short, one of another kind.
    meant = [["B-PER", "I-PER", "O", "B-LOC", "O", "B-ORG"], ["O", "B-LOC"]]
    said = [["B-PER", "O", "O", "B-LOC", "O", "B-PER"], ["O", "B-LOC"]]
    assert scores.of_tags(said, meant, by_entity=True) == {
        "F1 of entities": pytest.approx(2 * 2 / (4 + 4)),
        "precision": 2 / 4,
        "recall": 2 / 4,
        "accuracy of words": 6 / 8,
    }
    assert scores.of_entities(said, meant, "PER") == {"F1 of entities": 0.0, "precision": 0.0, "recall": 0.0}
    assert scores.of_entities(said, meant, "LOC")["F1 of entities"] == 1.0
    assert scores.of_tags(said, meant, by_entity=False) == {"accuracy of words": 6 / 8}
    assert scores.has_entities(LABELS)
    assert not scores.has_entities(["NOUN", "VERB"]) and not scores.has_entities(["O", "B-PER", "NOUN"])


# ---- What is refused


@pytest.mark.parametrize(
    "contents, words, message",
    [
        ("Anna B-PER\nran\n", (), "bad.txt, line 2: expected a word and its tag in at least 2 columns, but got 1"),
        ("Anna\tB-PER\nran\t\n", (), "bad.txt, line 2: expected a word and its tag, but the tag is empty"),
        ("\tB-PER\n", (), "bad.txt, line 1: expected a word and its tag, but the word is empty"),
        ("Anna B-PER\n", ("--label", 3), "line 1: expected a word and its tag in at least 3 columns, but got 2"),
        (
            "Anna B-PER\n",
            ("--label", 0),
            "--label: expected the number of a column from 1 on, or \"last\", but got '0'",
        ),
        ("Anna B-PER\n", ("--text", "word"), "--text: expected the number of a column"),
        ("Anna B-PER\nran O\n", (), "expected sentences for training, validation and test, but got"),
        ("Anna B-PER\n", ("--window", 32), "--window: expected a program that has this option, but got tag"),
        ("".join(f"w{i} O\n\n" for i in range(60)), (), r"expected 2 to 32768 different tags, but got 1 \('O'\)"),
        (
            "".join(f"w{i} {'RARE' if i == 5 else 'O' if i % 2 else 'X'}\n\n" for i in range(60)),
            ("--max-samples", 3),
            "expected every tag among the sentences for training, but 'RARE' is not",
        ),
        ("\n", (), "expected text, but the file is empty"),
    ],
    ids=range(11),
)
def test_bad_files_are_refused(
    made: Path, command: Run, contents: str, words: tuple[object, ...], message: str
) -> None:
    Path("bad.txt").write_text(contents)
    options = ("--checkpoint", made / "bert", "--data", "bad.txt", "--out", "run", "--device", "cpu")
    code, _, error = command("fine-tune", "tag", "--no-keep-memory", *options, *words)
    assert code == 2 and re.search(message, error), error
    assert not Path("run").exists()


def test_other_refusals(made: Path, command: Run) -> None:
    tag = ("tag", "--checkpoint", made / "bert", "--device", "cpu")
    cases: list[tuple[tuple[object, ...], str]] = [
        (("fine-tune", "tag", "--checkpoint", made / "bert"), "expected files of words and tags, but got none"),
        ((*tag, "some words"), "expected a model of `torchweld fine-tune tag` with id2label, a BertForToken"),
        ((*tag, "\udcff"), "TEXT: expected text in Unicode"),
        ((*tag, "some words", "--file", "x"), "TEXT: expected none beside --file"),
    ]
    for words, message in cases:
        code, out, error = command(*words)
        assert code == 2 and out == "" and re.search(message, error), error
