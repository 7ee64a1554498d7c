"""Paragraphs with questions, made at random, and a BERT of random weights that knows their words."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from commands import tiny_bert

CITIES = ["Oslo", "New York", "Rome", "Los Angeles", "Lima"]
NUMBERS = ["two", "fifty one", "seven", "ninety nine"]
SCENE = "we they walked from the old house to a new bridge and saw people of every kind with their dogs"


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
    """A file of SQuAD 2.0."""
    return json.dumps({"version": "v2.0", "data": [{"title": "all", "paragraphs": paragraphs}]})


def make(folder: Path) -> None:
    """Fills the folder: a BERT, 300 paragraphs in all.json, and 20 in test.json."""
    draw = random.Random(0)
    paragraphs = [paragraph(draw) for _ in range(300)]
    tiny_bert(folder / "bert", [p["context"] + " Which city was it? How many were there?" for p in paragraphs])
    (folder / "all.json").write_text(squad(paragraphs))
    (folder / "test.json").write_text(squad([paragraph(draw) for _ in range(20)]))
