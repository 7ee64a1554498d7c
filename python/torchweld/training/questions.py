"""Questions on contexts from files of SQuAD's JSON, with the answers as spans of the context; and their split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torchweld.errors import UserError
from torchweld.training.corpus import read_files
from torchweld.training.labelled import parted
from torchweld.training.lines import check_unicode


@dataclass(frozen=True)
class Span:
    """A part of a context. `start`: its first character."""

    text: str
    start: int

    @property
    def end(self) -> int:
        """Behind its last character."""
        return self.start + len(self.text)


@dataclass(frozen=True)
class Question:
    """A question on a context. `answers`: all that are right; none where the context does not have it."""

    text: str
    context: str
    answers: tuple[Span, ...] = ()

    @property
    def right(self) -> list[str]:
        """The texts of the answers."""
        return [answer.text for answer in self.answers]


@dataclass(frozen=True)
class Split:
    """Which questions are for what."""

    training: list[Question]
    validation: list[Question]
    test: list[Question]


def read_questions(paths: Sequence[str]) -> list[Question]:
    """The questions of all files, SQuAD 1.1 or 2.0.

    Raises:
        UserError: a file cannot be read or has another form, or an answer does not stand where it should.
    """
    found = []
    for path, contents in zip(paths, read_files(paths), strict=True):
        try:
            values = json.loads(contents)
        except ValueError as error:
            raise UserError(f"--data {path}: expected SQuAD's JSON, but got: {error}") from None
        if not isinstance(values, dict):
            raise UserError(f"--data {path}: expected SQuAD's JSON, but got {_short(values)}")
        for i, article in enumerate(_each(values, "data", f"--data {path}")):
            for j, paragraph in enumerate(_each(article, "paragraphs", f"--data {path}, data[{i}]")):
                place = f"--data {path}, data[{i}].paragraphs[{j}]"
                context = _text(paragraph, "context", place)
                for k, entry in enumerate(_each(paragraph, "qas", place)):
                    found.append(_question(entry, context, f"{place}.qas[{k}]"))
    return found


def _question(entry: Any, context: str, place: str) -> Question:
    text = _text(entry, "question", place)
    if entry.get("is_impossible") is True:
        return Question(text, context)
    answers = tuple(_answer(each, context, place) for each in _each(entry, "answers", place))
    if not answers:
        raise UserError(f'{place}: expected an answer, or "is_impossible": true, but got neither')
    return Question(text, context, answers)


def _answer(entry: Any, context: str, place: str) -> Span:
    text, start = _text(entry, "text", place), entry.get("answer_start")
    if type(start) is not int or start < 0:
        raise UserError(f"{place}: expected answer_start, the number of a character from 0 on, but got {start!r}")
    if (stands := context[start : start + len(text)]) != text:
        where = context.find(text)
        remedy = f"it stands at {where}" if where >= 0 else "the context does not have it"
        raise UserError(
            f"{place}: expected the answer {text!r} at character {start} of its context, but got {stands!r}; {remedy}"
        )
    return Span(text, start)


def _each(entry: Any, name: str, place: str) -> Iterator[Any]:
    values = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(values, list):
        raise UserError(f"{place}: expected a list {name!r}, as SQuAD's JSON has it, but got {_short(entry)}")
    return iter(values)


def _text(entry: Any, name: str, place: str) -> str:
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{place}: expected a text {name!r} that is not empty, but got {_short(entry)}")
    check_unicode(f"{place}: {name}", [value])
    return value


def _short(entry: Any) -> str:
    if not isinstance(entry, dict):
        return f"a value of type {type(entry).__name__}"
    return f"an object with {', '.join(map(repr, list(entry)[:8])) or 'no keys'}"


def split(questions: Sequence[Question], test: Sequence[Question] | None = None) -> Split:
    """Eight, one and one of ten contexts, by a hash: all questions on one are in one part.

    Args:
        test: the test, if it is apart; the last tenth is for training then.

    Raises:
        UserError: a part is empty.
    """
    names = ("questions", "context")
    return Split(*parted(questions, lambda question: question.context, names, test))


def digest(questions: Sequence[Question]) -> str:
    """Of all that they say."""
    found = hashlib.sha256()
    for question in questions:
        found.update(
            json.dumps([question.text, question.context, [(a.text, a.start) for a in question.answers]]).encode()
        )
    return found.hexdigest()
