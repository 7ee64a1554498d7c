"""`torchweld fine-tune answer` and `answer`: spans and windows, SQuAD's scores, learning, resuming, and refusals."""

from __future__ import annotations

import io
import json
import random
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from commands import Run, check_resuming, tiny_bert
from torchweld.errors import UserError
from torchweld.training import checkpoint, questions, scores, spans
from torchweld.training.nearby_words import NearbyWords
from torchweld.training.questions import Question, Span
from torchweld.training.tuning import outputs

CITIES = ["Oslo", "New York", "Rome", "Los Angeles", "Lima"]
NUMBERS = ["two", "fifty one", "seven", "ninety nine"]
SCENE = "we they walked from the old house to a new bridge and saw people of every kind with their dogs"
FILES = ("config.json", "model.safetensors", "optimizer.safetensors", "tokenizer.json", "training.json")


def paragraph(draw: random.Random) -> dict[str, Any]:
    """A city, and now and then a number, in words that mean nothing; a question on each."""
    city, number = draw.choice(CITIES), draw.choice([*NUMBERS, ""])
    words = draw.choices(SCENE.split(), k=draw.randint(4, 30))
    words.insert(draw.randint(0, len(words)), city)
    if number:
        words.insert(draw.randint(0, len(words)), f"({number})")
    context = " ".join(words) + "."
    asked = []
    for question, answer in (("Which city was it?", city), ("How many were there?", number)):
        spans = [{"text": answer, "answer_start": context.index(answer)}] if answer else []
        asked.append({"id": "0", "question": question, "answers": spans, "is_impossible": not answer})
    return {"context": context, "qas": asked}


def squad(paragraphs: list[dict[str, Any]]) -> str:
    return json.dumps({"version": "v2.0", "data": [{"title": "all", "paragraphs": paragraphs}]})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BERT of random weights and 300 paragraphs."""
    folder, draw = tmp_path_factory.mktemp("made"), random.Random(0)
    paragraphs = [paragraph(draw) for _ in range(300)]
    tiny_bert(folder / "bert", [p["context"] + " Which city was it? How many were there?" for p in paragraphs])
    (folder / "all.json").write_text(squad(paragraphs))
    (folder / "test.json").write_text(squad([paragraph(draw) for _ in range(20)]))
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


# ---- Windows and spans


@pytest.fixture(scope="module")
def tokenizer(made: Path) -> Tokenizer:
    found = Tokenizer.from_file(str(made / "bert/tokenizer.json"))
    found.no_padding()
    return found


def test_windows_cover_a_context_and_find_its_answer(tokenizer: Tokenizer) -> None:
    context = "we saw the old house " * 12 + "of  New York" + " and the new bridge" * 8
    start = context.index("New")
    asked = [Question("Which city?", context, (Span("New York", start),)), Question("How many?", "two dogs")]
    windows = spans.Windows(asked, tokenizer, spans.Cut(32, 12))
    count = len(tokenizer.encode(context, add_special_tokens=False).ids)
    own = [window for window in windows.windows if window.question == 0]
    assert own[0].first == 0 and own[-1].last == count and len(windows) == len(own) + 1
    assert all(b.first - a.first == 12 and b.first < a.last for a, b in pairwise(own))
    assert max(windows.lengths) == 32
    held = 0
    for index in range(len(own)):
        tokens, types, bounds, ends = windows.batch([index]).tensors
        assert bounds.tolist() == [0, len(tokens)] == [0, windows.lengths[index]]
        assert tokenizer.decode(tokens[: int((types == 0).sum())].tolist()) == "which city?"
        first, last = ends[0].tolist()
        if (first, last) != (0, 0):
            held += 1
            assert tokenizer.decode(tokens[first : last + 1].tolist()) == "new york" and types[first] == 1
    assert 0 < held < len(own)
    assert windows.ends[-1].tolist() == [0, 0]


class _Marks(torch.nn.Module):
    """Speaks for the tokens `first` and `last` by 1, for "" by `none`, and for the same in the question by 9."""

    per_token = True

    def __init__(self, first: int, last: int, none: float) -> None:
        super().__init__()
        self.weight, self.first, self.last, self.none = torch.nn.Parameter(torch.ones(1)), first, last, none

    def forward(self, tokens: torch.Tensor, types: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        wanted = torch.tensor([self.first, self.last])
        logits = (tokens[:, None] == wanted).float() * (1 + 8 * (types == 0))[:, None]
        return logits.index_fill(0, cu_seqlens[:-1].long(), self.none) * self.weight


def test_the_best_span_of_all_windows_is_the_answer(tokenizer: Tokenizer) -> None:
    first, last = (tokenizer.encode(word, add_special_tokens=False).ids[0] for word in ("house", "bridge"))
    context = "we saw people " * 15 + "the old  house and a bridge, " + "we saw people " * 15
    asked = [Question("Which house or bridge?", context), Question("Which bridge?", "people saw dogs")]
    windows = spans.Windows(asked, tokenizer, spans.Cut(32, 12))
    found, nothing = windows.answers(_Marks(first, last, 0.5), 3, nullcontext(), unanswerable=True)
    assert found.text == "house and a bridge" == context[found.start : found.end]
    assert found.margin == pytest.approx(2.0 - 1.0) and 0 < found.probability < 1
    assert (nothing.text, nothing.margin) == ("", -1.0)
    _, forced = windows.answers(_Marks(first, last, 0.5), 3, nullcontext(), unanswerable=False)
    assert forced.text == "people"  # all are alike
    outs = outputs(_Marks(first, last, 0.5), windows, 2, nullcontext())
    assert [len(each) for each in outs] == windows.lengths


def test_best_span_is_the_largest_sum() -> None:
    torch.manual_seed(0)
    for count in (1, 5, 80):
        logits = torch.randn(count, 2)
        allowed = [(i, j) for i in range(count) for j in range(i, min(count, i + spans.LONGEST_ANSWER))]
        i, j = max(allowed, key=lambda pair: float(logits[pair[0], 0] + logits[pair[1], 1]))
        score, first, last = spans.best_span(logits)
        assert (first, last) == (i, j) and score == pytest.approx(float(logits[i, 0] + logits[j, 1]))


def test_a_context_without_tokens_has_no_answer(tokenizer: Tokenizer) -> None:
    windows = spans.Windows([Question("Which city?", "\u200b\x01")], tokenizer, spans.Cut(32, 12))
    (found,) = windows.answers(_Marks(1, 1, 0.0), 4, nullcontext(), unanswerable=False)
    assert found.text == "" and windows.ends.tolist() == [[0, 0]]


# ---- Scores


def test_scores_are_those_of_squad() -> None:
    assert scores.answer_words("The  Cat's (an) answer, a-b!") == ["cats", "answer", "ab"]
    assert scores.overlap("the cat sat", "A cat sat down") == pytest.approx(2 * 2 / (2 + 3))
    assert scores.overlap("cat cat dog", "cat") == pytest.approx(2 * 1 / 4)
    assert (scores.overlap("the", ""), scores.overlap("the", "cat"), scores.overlap("dog", "cat")) == (1.0, 0.0, 0.0)
    said = ["The Cat!", "two dogs", "", "a bird"]
    meant = [["dog", "cat"], ["dogs", "no"], [], []]
    found = scores.of_answers(said, meant)
    assert found == {
        "exact match, %": 50.0,
        "F1, %": pytest.approx(100 * (1 + 2 / 3 + 1 + 0) / 4),
        "F1 of the answerable, %": pytest.approx(100 * (1 + 2 / 3) / 2),
        "unanswerable found, %": 50.0,
    }
    assert list(scores.of_answers(said[:2], meant[:2])) == ["exact match, %", "F1, %"]


def test_nearby_words() -> None:
    context = "Anna went home. The king of Spain is Philip. Rain fell over the hills of Spain and Portugal."
    asked = Question("Who is the king of Spain?", context, (Span("Philip", context.index("Philip")),))
    assert NearbyWords([asked], [asked])(asked) == "Philip"
    other = Question("Why do zebras sing?", context)
    learned = NearbyWords([asked, other], [asked, other, Question("Who?", "...")])
    assert (learned(asked), learned(other)) == ("Philip", "")
    assert learned(Question("Who?", "...")) == ""


# ---- What is refused


def change(what: Callable[[dict[str, Any]], Any]) -> str:
    values = json.loads(squad([paragraph(random.Random(1))]))
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
    Path("none.json").write_text(squad(paragraphs))
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


def test_split_keeps_a_context_in_one_part() -> None:
    asked = [Question(f"question {i}?", f"context {i % 200}", (Span("context", 0),)) for i in range(400)]
    parts = questions.split(asked)
    sets = [{q.context for q in part} for part in (parts.training, parts.validation, parts.test)]
    assert sum(map(len, sets)) == 200 and min(map(len, sets)) > 5
    with_test = questions.split(asked, asked[:3])
    assert with_test.test == asked[:3] and with_test.validation == parts.validation
    assert len(with_test.training) == len(parts.training) + len(parts.test)
    assert questions.digest(asked) != questions.digest(asked[:-1])
    with pytest.raises(UserError, match=r"but got 0 / 0 / 1|but got 0 / 1 / 0|but got 1 / 0 / 0"):
        questions.split(asked[:1])
