"""`torchweld fine-tune` and `classify`: learning beside a bag of words, resuming to the bit, and what they refuse."""

from __future__ import annotations

import csv
import io
import json
import random
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from commands import Run, interrupt_after, tiny_bert
from torchweld.training import bag_of_words, checkpoint, labelled, scores

WORDS = {"good": 1.5, "lovely": 2.0, "fine": 0.8, "bad": -1.5, "awful": -2.5, "poor": -1.0}
REST = [
    "the",
    "a",
    "this",
    "day",
    "film",
    "book",
    "was",
    "is",
    "really",
    "quite",
    "and",
    "we",
    "thought",
    "it",
    "plain",
    "with",
    "very",
    "many",
    "words",
    "of",
    "no",
    "weight",
]
FILES = ("config.json", "model.safetensors", "optimizer.safetensors", "tokenizer.json", "training.json")


def sentences(count: int) -> list[tuple[str, float]]:
    """Texts of unequal lengths, and the weight of the one word in them that has any."""
    draw = random.Random(0)
    found = []
    for _ in range(count):
        weighed = [draw.choice(list(WORDS))] * draw.randint(1, 3)
        words = weighed + draw.choices(REST, k=draw.randint(2, 12))
        draw.shuffle(words)
        found.append((" ".join(words), WORDS[weighed[0]]))
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BERT of random weights, and texts as TSV with numbers and as CSV and JSON lines with labels."""
    folder = tmp_path_factory.mktemp("made")
    rows = sentences(400)
    tiny_bert(folder / "bert", [text for text, _ in rows])
    (folder / "rated.tsv").write_text("".join(f'{i}\t{rate}\t"{text}\n' for i, (text, rate) in enumerate(rows)))
    kinds = [("good" if rate > 1.0 else "bad" if rate < -0.5 else "so-so", text) for text, rate in rows]
    with (folder / "kinds.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("label", "text"), *((kind, f'"{text}",\nhe said') for kind, text in kinds)])
    (folder / "kinds.jsonl").write_text("".join(json.dumps({"kind": k, "said": t}) + "\n" for k, t in kinds))
    return folder


@pytest.fixture
def regress(made: Path, command: Run) -> Run:
    """Runs `torchweld fine-tune regress` on the rated texts."""
    columns = ("--data", made / "rated.tsv", "--label", 2, "--text", 3)
    options = ("--checkpoint", made / "bert", "--device", "cpu", "--no-keep-memory", *columns)
    return lambda *words: command("fine-tune", "regress", *options, *words)


def classify(made: Path, command: Run, *words: object) -> tuple[int, str, str]:
    options = ("--checkpoint", made / "bert", "--device", "cpu", "--no-keep-memory")
    return command("fine-tune", "classify", *options, *words)


@pytest.mark.slow
def test_regress_learns_and_classify_answers(
    regress: Run, command: Run, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    transformers = pytest.importorskip("transformers", reason="loads the checkpoint with transformers, a test extra")
    code, out, error = regress("--epochs", 5, "--learning-rate", 2e-3, "--out", "run")
    assert code == 0, error
    (r,) = re.findall(r"BERT +│ +(-?[\d.]+)", out)
    assert float(r) > 0.8
    assert re.search(r"bag of words +│ +0\.9", out) and "the same for all" in out and "the most wrong" in out
    best = checkpoint.best(Path("run"))
    assert best is not None and f"best validation: {best}" in out

    lines = ["it was a lovely film", "", "a very awful book"]
    (home / "lines.txt").write_text("\n".join(lines) + "\n")
    code, out, _ = command("classify", "--checkpoint", "run", "lines.txt", "--json", "--device", "cpu")
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [answer["text"] for answer in answers] == lines and answers[1] == {"text": ""}
    assert answers[0]["score"] > 0.5 > -0.5 > answers[2]["score"]

    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    code, out, _ = command("classify", "--checkpoint", best, "--device", "cpu")
    assert code == 0 and out.splitlines()[0] == f"{answers[0]['score']}\t{lines[0]}" and out.splitlines()[1] == ""

    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(best).eval()
    tokenizer = Tokenizer.from_file(str(best / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode(lines[0]).ids])
    with torch.no_grad():
        assert theirs(ids).logits.item() == pytest.approx(answers[0]["score"], abs=2e-4)
    assert theirs.config.problem_type == "regression"


@pytest.mark.slow
def test_classify_learns_labels(made: Path, command: Run) -> None:
    words = ("--data", made / "kinds.csv", "--epochs", 6, "--learning-rate", 2e-3, "--out", "run")
    code, out, error = classify(made, command, *words, "--compare", "torch")
    assert code == 0, error
    assert "they agree" in out and "what was taken for what" in out and "3 labels" in out
    (accuracy,) = re.findall(r"BERT +│ +([\d.]+)", out)
    (constant,) = re.findall(r"the same for all +│ +([\d.]+)", out)
    assert float(accuracy) > float(constant) + 0.2
    Path("one.txt").write_text("a really good day\n")
    code, out, _ = command("classify", "--checkpoint", "run", "one.txt", "--device", "cpu")
    label, probability, text = out.rstrip("\n").split("\t")
    assert (label, text) == ("good", "a really good day") and 1 / 3 < float(probability) <= 1.0


def test_json_lines_are_the_same_data(made: Path) -> None:
    table = labelled.read_rows([str(made / "kinds.csv")], "text", "label")
    lines = labelled.read_rows([str(made / "kinds.jsonl")], "said", "kind")
    assert table.labels == lines.labels and len(lines) == 400
    assert table.texts == [f'"{text}", he said' for text in lines.texts]  # quoted, with a line break inside
    assert lines.places[7].endswith("kinds.jsonl, line 8")


@pytest.mark.slow
def test_resume_continues_bit_for_bit(regress: Run, command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = ("--steps", 12, "--validate-every", 5, "--accumulate", 2, "--max-samples", 70)
    assert regress(*steps, "--out", "straight")[0] == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7)
        code, out, _ = regress(*steps, "--out", "broken")
    assert code == 130 and "torchweld fine-tune regress --resume broken" in out
    again = ("fine-tune", "regress", "--device", "cpu", "--no-keep-memory", "--resume", "broken")
    code, _, error = command(*again, "--max-samples", 80)
    assert code == 2 and "--max-samples: expected 70, with which the run was started, but got 80" in error
    code, out, error = command(*again)
    assert "1 files, 70 / " in out
    assert code == 0 and "resuming after step 7" in out, error
    for name in FILES:
        straight, broken = (Path(out, "checkpoint-12", name).read_bytes() for out in ("straight", "broken"))
        assert straight == broken, name


# ---- What is refused


def spoil(path: Path, change: Callable[[list[str]], Any]) -> None:
    lines = path.read_text().splitlines()
    change(lines)
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda rows: rows.__setitem__(4, "4\thigh\tsome text"), "line 5: expected a finite number .* got 'high'"),
        (lambda rows: rows.__setitem__(4, "4\tnan\tsome text"), "line 5: expected a finite number .* got 'nan'"),
        (lambda rows: rows.__setitem__(4, "4\t1.0"), "line 5: expected at least 3 columns, but got 2"),
        (lambda rows: rows.__delitem__(slice(3, None)), "expected texts for training, validation and test, but got"),
    ],
)
def test_regress_refuses_bad_rows(made: Path, command: Run, change: Callable[[list[str]], Any], message: str) -> None:
    shutil.copy(made / "rated.tsv", "bad.tsv")
    spoil(Path("bad.tsv"), change)
    words = ("--checkpoint", made / "bert", "--data", "bad.tsv", "--label", 2, "--text", 3, "--out", "run")
    code, _, error = command("fine-tune", "regress", "--device", "cpu", "--no-keep-memory", *words)
    assert code == 2 and re.search(message, error) and not Path("run").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["--data", "kinds.csv", "--label", "class"],
            "expected a column 'class' in its first line, but got 'label', 'text'",
        ),
        (["--data", "kinds.csv", "--label", "0", "--text", "1"], "expected numbers of columns from 1 on, but got 0"),
        (["--data", "kinds.jsonl"], "line 1: expected an object with 'text' and 'label', but got 'kind', 'said'"),
        (["--data", "broken.jsonl"], "line 1: expected a JSON object"),
        (["--data", "one.csv"], "expected 2 to 32768 different labels, but got 1 .*fine-tune regress"),
        (["--data", "rare.csv"], "expected every label among the texts for training, but 'rare' is not"),
        (["--data", "unlabelled.csv"], "line 2: expected a label, but got none"),
        (["--data", "absent.csv"], "No such file"),
        ([], "expected files of texts and labels, but got none; name them with --data"),
        (["--data", "kinds.csv", "--optimizer", "lion"], "--optimizer: expected one of"),
        (["--data", "kinds.csv", "--epochs", "0"], "--epochs: expected a whole number of at least 1"),
        (["--data", "kinds.csv", "--batch-size", "9", "--accumulate", "2"], "--batch-size: expected a multiple"),
    ],
    ids=str,
)
def test_classify_refuses(made: Path, command: Run, words: list[str], message: str) -> None:
    for name in ("kinds.csv", "kinds.jsonl"):
        shutil.copy(made / name, name)
    rows = sentences(100)
    Path("one.csv").write_text("text,label\n" + "".join(f"{text},same\n" for text, _ in rows))
    tested = next(text for text, _ in rows if len(labelled.split(_rows([text, *(t for t, _ in rows)]))[2]) > 0
                  and text in labelled.split(_rows([t for t, _ in rows]))[2].texts)  # fmt: skip
    kinds = "".join(f"{text},{'rare' if text == tested else 'good' if rate > 0 else 'bad'}\n" for text, rate in rows)
    Path("rare.csv").write_text("text,label\n" + kinds)
    Path("unlabelled.csv").write_text("text,label\nsome words,\n")
    Path("broken.jsonl").write_text("{\n")
    code, _, error = classify(made, command, *words, "--out", "run")
    assert code == 2 and re.search(message, error) and not Path("run").exists()


def _rows(texts: list[str]) -> labelled.Rows:
    return labelled.Rows(texts, [""] * len(texts), [""] * len(texts))


def test_other_refusals(made: Path, command: Run) -> None:
    data = ("--data", made / "kinds.csv")
    for words, message in (
        (("fine-tune", "translate"), "expected one of classify, regress, answer, tag, but got 'translate'"),
        (
            ("fine-tune", "classify", *data),
            "expected a trained BERT, but got none; name its directory with --checkpoint",
        ),
        (("fine-tune", "classify", "--checkpoint", "nowhere", *data), "checkpoint nowhere: .*no such directory"),
        (("fine-tune", "classify", "--checkpoint", made / "bert", "--resume", "run"), "--checkpoint: expected none"),
        (("fine-tune", "classify", "--epochs", 2, "--resume", "run"), "--epochs: expected a fresh run without --steps"),
        (("classify", "--checkpoint", made / "bert"), "expected a model of `torchweld fine-tune`"),
        (("generate", "--checkpoint", made / "bert"), "model_type: expected 'gpt2' or 'gpt_neo', but got 'bert'"),
    ):
        code, out, error = command(*words)
        assert code == 2 and out == "" and re.search(message, error)
    shutil.copytree(made / "bert", "bert")
    state = load_file("bert/model.safetensors")
    del state["bert.encoder.layer.1.output.dense.weight"]
    save_file(state, "bert/model.safetensors")
    code, _, error = command(
        "fine-tune", "classify", "--checkpoint", "bert", *data, "--device", "cpu", "--no-keep-memory"
    )
    assert code == 2 and "'encoder.layer.1.output.dense.weight' is missing" in error
    assert not Path("torchweld-classify").exists()


# ---- Parts


def test_split_keeps_a_text_in_one_part() -> None:
    texts = [f"text {i % 500}" for i in range(1000)]
    parts = labelled.split(_rows(texts))
    assert sum(map(len, parts)) == 1000 and [len(part) for part in parts] == [796, 110, 94]
    sets = [set(part.texts) for part in parts]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])


def test_ridge_is_that_of_the_normal_equations() -> None:
    texts = [text for text, _ in sentences(80)]
    features = bag_of_words.Features(texts)
    x, y = features.matrix(texts), torch.randn(80, 3)
    dense = (x @ torch.eye(x.shape[1])).double()
    torch.testing.assert_close(dense.norm(dim=1), torch.ones(80).double())
    expected = torch.linalg.solve(dense.T @ dense + 0.7 * torch.eye(x.shape[1]).double(), dense.T @ y.double())
    torch.testing.assert_close(bag_of_words.ridge(x, y, 0.7).double(), expected, rtol=1e-3, atol=1e-4)


def test_scores() -> None:
    meant = torch.tensor([1.0, -2.0, 0.1, 3.0])
    found = scores.of_numbers(torch.tensor([[2.0], [-1.0], [0.0], [-1.0]]), meant)
    assert found["squared error"] == pytest.approx((1 + 1 + 0.01 + 16) / 4)
    assert found["sign, beyond 0.5"] == pytest.approx(2 / 3)
    assert found["r"] == pytest.approx(
        float(torch.corrcoef(torch.stack([meant, torch.tensor([2.0, -1, 0, -1])]))[0, 1])
    )
    assert "sign, beyond 0.5" not in scores.of_numbers(meant[:, None], meant.abs())
    labels = scores.of_labels(torch.eye(3)[[0, 0, 1, 2]], torch.tensor([0, 1, 1, 2]))
    assert labels == {"accuracy": 0.75, "mean F1": pytest.approx((2 / 3 + 2 / 3 + 1) / 3)}
