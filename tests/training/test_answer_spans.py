"""Answers as spans of their contexts: windows, the best span, SQuAD's scores, and the split of questions."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

import squad
from torchweld.errors import UserError
from torchweld.training import questions, scores, spans
from torchweld.training.nearby_words import NearbyWords
from torchweld.training.questions import Question, Span
from torchweld.training.tuning import outputs


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("made")
    squad.make(folder)
    found = Tokenizer.from_file(str(folder / "bert/tokenizer.json"))
    found.no_padding()
    return found


# ---- Windows and spans


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


# ---- Questions


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
