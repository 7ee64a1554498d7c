"""`torchweld fine-tune answer` and `answer`: learning, resuming, what is read and printed, and refusals."""

from __future__ import annotations

import io
import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import squad
from commands import Run, check_resuming
from squad import SCENE, paragraph
from torchweld.training import checkpoint

FILES = ("config.json", "model.safetensors", "optimizer.safetensors", "tokenizer.json", "training.json")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    squad.make(folder)
    return folder


@pytest.fixture
def tune(made: Path, command: Run) -> Run:
    """Runs `torchweld fine-tune answer` on the paragraphs."""
    options = ("--checkpoint", made / "bert", "--data", made / "all.json", "--device", "cpu", "--no-keep-memory")
    return lambda *words: command("fine-tune", "answer", *options, *words)


@pytest.mark.slow
def test_learns_and_answers(made: Path, tune: Run, command: Run, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="loads the checkpoint with transformers, a test extra")
    options = ("--epochs", 10, "--learning-rate", 2e-3, "--window", 32, "--stride", 12, "--test", made / "test.json")
    code, out, error = tune(*options, "--out", "run")
    assert code == 0, error
    assert "/ 40 for training, validation and test" in out and "the most wrong" in out
    found = json.loads(Path("run/scores.json").read_text())
    assert found["BERT"]["F1, %"] > max(each["F1, %"] for who, each in found.items() if who != "BERT") + 10
    assert found["no answer to any"]["unanswerable found, %"] == 100.0
    best = checkpoint.best(Path("run"))
    assert best is not None and json.loads((best / "config.json").read_text())["unanswerable"] is True

    context = f"{SCENE} they walked from Rome to the (ninety nine) people {SCENE}"
    (home / "context.txt").write_text(context)
    answer = ("answer", "--checkpoint", "run", "--device", "cpu")
    asked = ["Which city was it?", "", "How many were there?"]
    code, out, error = command(*answer, "--context", "context.txt", "--json", *asked)
    assert code == 0, error
    city, nothing, number = (json.loads(line) for line in out.splitlines())
    assert nothing == {"question": ""} and (city["answer"], number["answer"]) == ("Rome", "ninety nine")
    assert context[city["start"] : city["end"]] == "Rome" and 0 < city["probability"] <= 1 and city["margin"] > 0

    (home / "asked.txt").write_text("\n".join(asked) + "\n")
    line = f"Rome\t{city['probability']:.4f}\t{asked[0]}"
    for words, typed in (
        (("--context", "context.txt", "--file", "asked.txt"), ""),
        (("--context", "context.txt"), "\n".join(asked)),
        (("--text", context), "\n".join(asked)),
        (("--file", "asked.txt"), context),
        ((*asked,), context),
    ):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        code, out, error = command(*answer, *words)
        assert code == 0 and out.splitlines()[0].split("\t")[::2] == ["Rome", asked[0]], (words, error)
        assert out.splitlines()[0] == line and out.splitlines()[1] == ""

    empty = ("--text", "they saw people of every kind in Lima with their dogs", asked[2])
    assert command(*answer, *empty)[1].startswith("\t")
    assert not command(*answer, *empty, "--no-unanswerable")[1].startswith("\t")
    code, out, _ = command(*answer, "--text", "\x01", asked[0], "--json")
    assert json.loads(out).keys() == {"question", "answer", "probability"}  # not even a token

    theirs = transformers.AutoModelForQuestionAnswering.from_pretrained(best).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(best / "tokenizer.json"))
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    text = "they saw Lima from the old bridge"
    batch = tokenizer(asked[0], text, return_tensors="pt")
    with torch.no_grad():
        logits = theirs(**batch)
    first, last = int(logits.start_logits.argmax()), int(logits.end_logits.argmax())
    assert tokenizer.decode(batch["input_ids"][0, first : last + 1]) == "lima"


@pytest.mark.slow
def test_compares(tune: Run) -> None:
    code, out, error = tune("--steps", 6, "--max-samples", 60, "--compare", "torch", "--out", "run")
    assert code == 0, error
    assert "they agree" in out and "every token alike" in Path("run/report.html").read_text()


@pytest.mark.slow
def test_resume_continues_bit_for_bit(tune: Run, command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def again(*words: object) -> tuple[int, str, str]:
        return command("fine-tune", "answer", "--no-keep-memory", *words)

    check_resuming(tune, again, monkeypatch, FILES, ("--max-samples", 70, "--window", 40))
    code, _, error = again("--resume", "broken", "--window", 48)
    assert code == 2 and "--window: expected '40', with which the run was started, but got '48'" in error
    code, out, _ = again("--resume", "broken", "--steps", 9, "--device", "cpu")
    assert code == 0 and "resuming after step 8" in out


@pytest.mark.slow
def test_a_head_for_answers_is_kept(made: Path, tune: Run) -> None:
    assert tune("--steps", 1, "--max-samples", 30, "--out", "first")[0] == 0
    before = load_file("first/checkpoint-1/model.safetensors")["qa_outputs.weight"]
    words = ("--checkpoint", "first", "--steps", 1, "--max-samples", 30, "--learning-rate", 1e-9, "--out", "second")
    assert tune(*words)[0] == 0
    after = load_file("second/checkpoint-1/model.safetensors")["qa_outputs.weight"]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


# ---- What is refused


def change(what: Callable[[dict[str, Any]], Any]) -> str:
    values = json.loads(squad.squad([paragraph(random.Random(1))]))
    what(values)
    return json.dumps(values)


def first(values: dict[str, Any]) -> Any:
    return values["data"][0]["paragraphs"][0]


@pytest.mark.parametrize(
    "contents, message",
    [
        ("{", "expected SQuAD's JSON, but got"),
        ("[1]", "expected SQuAD's JSON, but got a value of type list"),
        ("{}", "expected a list 'data', .*but got an object with no keys"),
        (change(lambda v: first(v).pop("context")), r"paragraphs\[0\]: expected a text 'context' .* with 'qas'"),
        (
            change(lambda v: first(v).update(qas=[3])),
            r"qas\[0\]: expected a text 'question' .*but got a value of type int",
        ),
        (change(lambda v: first(v)["qas"][0].pop("answers")), r"qas\[0\]: expected a list 'answers'"),
        (change(lambda v: first(v)["qas"][0].update(answers=[])), 'expected an answer, or "is_impossible": true'),
        (
            change(lambda v: first(v)["qas"][0]["answers"][0].update(answer_start=1)),
            r"qas\[0\]: expected the answer '.*' at character 1 of its context, but got '.*'; it stands at \d+",
        ),
        (change(lambda v: first(v)["qas"][0]["answers"][0].update(text="Nowhere")), "the context does not have it"),
        (change(lambda v: first(v)["qas"][0]["answers"][0].update(answer_start="1")), "expected answer_start, .*'1'"),
        (change(lambda v: first(v)["qas"][0]["answers"][0].update(text=" ")), "expected a text 'text'"),
        (
            change(lambda v: first(v)["qas"][0].update(question="\ud800?")),
            r"qas\[0\]: question: expected text in Unicode",
        ),
        (change(lambda v: None), "expected questions for training, validation and test, but got"),
    ],
    ids=range(13),
)
def test_bad_files_are_refused(made: Path, command: Run, contents: str, message: str) -> None:
    Path("bad.json").write_text(contents)
    words = ("--checkpoint", made / "bert", "--data", "bad.json", "--out", "run", "--device", "cpu")
    code, _, error = command("fine-tune", "answer", "--no-keep-memory", *words)
    assert code == 2 and re.search(message, error) and not Path("run").exists()


def test_other_refusals(made: Path, tune: Run, command: Run) -> None:
    paragraphs = [paragraph(random.Random(i)) for i in range(60)]
    for each in paragraphs:
        each["qas"] = [{**entry, "is_impossible": True} for entry in each["qas"]]
    Path("none.json").write_text(squad.squad(paragraphs))
    Path("empty.json").write_text('{"data": []}')
    tuned: list[tuple[tuple[object, ...], str]] = [
        (("--window", 65), "--window: expected 16 to 64 tokens, the max_position_embeddings of the checkpoint, but"),
        (("--window", 15), "--window: expected 16 to 64 tokens"),
        (("--stride", 0), "--stride: expected a whole number of at least 1"),
        (("--label", "x"), "--label: expected a program that has this option, but got answer"),
        (("--test", "absent.json"), "absent.json: .*No such file"),
        (("--test", "empty.json"), r"for training, validation and test, but got \d+ / \d+ / 0 of"),
        (("--data", "none.json"), "expected questions for training that have an answer, but all are unanswerable"),
    ]
    for words, message in tuned:
        code, _, error = tune(*words, "--out", "run")
        assert code == 2 and re.search(message, error), error
        assert not Path("run").exists()
    answer = ("answer", "--checkpoint", made / "bert", "--device", "cpu")
    others: list[tuple[tuple[object, ...], str]] = [
        (("fine-tune", "answer", "--checkpoint", made / "bert"), "expected files of SQuAD's JSON, but got none"),
        (("fine-tune", "classify", "--window", 9), "--window: expected a program that has this option"),
        ((*answer, "Who?", "--text", "a"), "expected a model of `torchweld fine-tune answer`, with qa_outputs"),
        ((*answer, "\udcff?", "--text", "a"), "QUESTION, --text: expected text in Unicode"),
        ((*answer, "Who?", "--file", "x"), "QUESTION: expected none beside --file"),
        ((*answer, "Who?", "--text", "a", "--context", "x"), "--text: expected none beside --context"),
        (answer, "expected a text beside the questions from standard input, but got none"),
    ]
    for words, message in others:
        code, out, error = command(*words)
        assert code == 2 and out == "" and re.search(message, error), error
    assert tune("--steps", 1, "--max-samples", 30, "--out", "run")[0] == 0
    for words, message in (
        (("--text", " "), "--context: expected a text, but it is empty"),
        (("--context", "absent.txt"), "absent.txt: expected a readable text file"),
    ):
        code, out, error = command("answer", "--checkpoint", "run", "--device", "cpu", "Who?", *words)
        assert code == 2 and out == "" and re.search(message, error), error
