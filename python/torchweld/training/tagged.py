"""Sentences of tagged words, from files with a word a line, as CoNLL's; and as sequences for a BERT."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from tokenizers import Tokenizer

from torchweld.errors import UserError
from torchweld.training.corpus import SEPARATOR, read_files, special_token
from torchweld.training.packing import pack
from torchweld.training.program import Batch
from torchweld.training.tuning import Examples, outputs

LAST = "last"
_COMMENT = re.compile(r"#\s.*=")  # as CoNLL-U has them before a sentence


@dataclass(frozen=True)
class Sentence:
    """Words and the tag of each. `place`: file and line of the first one, for messages."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    place: str = ""

    @property
    def text(self) -> str:
        """The words, with a space between them."""
        return " ".join(self.words)


def read_sentences(paths: Sequence[str], text: str, label: str) -> list[Sentence]:
    """The sentences of all files: a word a line, columns parted by tabs or by spaces, an empty line behind a sentence.

    Args:
        paths: of the files.
        text, label: the numbers of the columns of words and tags from 1 on, or "last".

    Raises:
        UserError: a file cannot be read, or a line does not have the columns.
    """
    columns = [_column(f"--{name}", value) for name, value in (("text", text), ("label", label))]
    found = []
    for path, contents in zip(paths, read_files(paths), strict=True):
        words: list[str] = []
        tags: list[str] = []
        # str.splitlines also cuts at characters that words may have.
        for line, row in enumerate([*contents.split("\n"), ""], 1):
            if not row.strip():
                if words:
                    found.append(Sentence(tuple(words), tuple(tags), f"{path}, line {line - len(words)}"))
                    words, tags = [], []
            elif not row.startswith("-DOCSTART-") and not (_COMMENT.match(row) and not words):
                word, tag = _cells(row, columns, f"--data {path}, line {line}")
                words.append(word)
                tags.append(tag)
    return found


def _column(option: str, value: str) -> int:
    """Its index, from the end if it is negative."""
    if value == LAST:
        return -1
    if not (value.isascii() and value.isdigit() and int(value)):
        raise UserError(f'{option}: expected the number of a column from 1 on, or "{LAST}", but got {value!r}')
    return int(value) - 1


def _cells(row: str, columns: list[int], place: str) -> tuple[str, str]:
    cells = [cell.strip() for cell in row.split("\t")] if "\t" in row else row.split()
    least = max(2, *(column + 1 for column in columns))
    if len(cells) < least:
        raise UserError(f"{place}: expected a word and its tag in at least {least} columns, but got {len(cells)}")
    word, tag = (cells[column] for column in columns)
    if not word or not tag:
        raise UserError(f"{place}: expected a word and its tag, but {'the tag' if word else 'the word'} is empty")
    return word, tag


def digest(sentences: Sequence[Sentence]) -> str:
    """Of words and tags."""
    return hashlib.sha256(json.dumps([(each.words, each.tags) for each in sentences]).encode()).hexdigest()


@dataclass(frozen=True)
class Piece:
    """A part of a sentence that fits the model: its tokens, and the first token of each word by the word's number."""

    sentence: int
    tokens: list[int]
    places: dict[int, int]


@dataclass(frozen=True)
class Tag:
    """What a word was tagged with."""

    label: str
    probability: float


class Sentences(Examples):
    """Sentences as sequences; the first token of a word has its tag. One too long for the model is cut into several.

    `labels`: of the tags, in the order of the model's; what is asked about has no tags.
    """

    def __init__(
        self, sentences: Sequence[Sentence], tokenizer: Tokenizer, longest: int, labels: Sequence[str]
    ) -> None:
        self.sentences, self.labels = sentences, labels
        self._index = {label: i for i, label in enumerate(labels)}
        self._start, self._close = (special_token(tokenizer, token) for token in ("[CLS]", SEPARATOR))
        words = [list(sentence.words) for sentence in sentences]
        encoded = tokenizer.encode_batch(words, is_pretokenized=True, add_special_tokens=False)
        self.pieces = [piece for i, each in enumerate(encoded) for piece in self._cut(i, each, longest - 2)]

    def _cut(self, sentence: int, encoding: Any, room: int) -> Iterator[Piece]:
        """Between words, wherever the next one has no room."""
        words: dict[int, list[int]] = {}
        for token, word in zip(encoding.ids, encoding.word_ids, strict=True):
            words.setdefault(word, []).append(token)
        tokens: list[int] = []
        places: dict[int, int] = {}
        for word, own in words.items():
            if places and len(tokens) + len(own) > room:
                yield self._piece(sentence, tokens, places)
                tokens, places = [], {}
            places[word] = len(tokens) + 1
            tokens = tokens + own[:room]
        if places:
            yield self._piece(sentence, tokens, places)

    def _piece(self, sentence: int, tokens: list[int], places: dict[int, int]) -> Piece:
        return Piece(sentence, [self._start, *tokens, self._close], places)

    @cached_property
    def lengths(self) -> list[int]:
        """As in `Examples`."""
        return [len(piece.tokens) for piece in self.pieces]

    def batch(self, indices: Sequence[int]) -> Batch:
        """As in `Examples`."""
        chosen = [self.pieces[i] for i in indices]
        tokens, bounds = pack([piece.tokens for piece in chosen])
        places, tags = [], []
        for piece, start in zip(chosen, bounds.tolist(), strict=False):
            sentence = self.sentences[piece.sentence]
            places += [start + place for place in piece.places.values()]
            tags += [self._index[sentence.tags[word]] for word in piece.places if sentence.tags]
        tensors = (tokens, torch.zeros_like(tokens), bounds, torch.tensor(places), torch.tensor(tags))
        return Batch(tensors, {"loss": len(places)}, len(tokens))

    def tags(self, model: Any, size: int, precision: Any, otherwise: str) -> list[list[Tag]]:
        """The model's tags of each sentence, `size` sequences at once; `otherwise` where a word has no token."""
        found = [[Tag(otherwise, 0.0)] * len(sentence.words) for sentence in self.sentences]
        for piece, logits in zip(self.pieces, outputs(model, self, size, precision), strict=True):
            best, numbers = logits[list(piece.places.values())].softmax(1).max(1)
            for word, probability, number in zip(piece.places, best.tolist(), numbers.tolist(), strict=True):
                found[piece.sentence][word] = Tag(self.labels[number], probability)
        return found
