"""`torchweld tag`: the tags of the words of texts, by a BERT that was fine-tuned for them."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from torchweld.errors import UserError
from torchweld.models.bert import BERTConfig
from torchweld.models.bert_tokens import BERTForTokenClassification
from torchweld.training import checkpoint, scores
from torchweld.training.arguments import add_machine_options
from torchweld.training.lines import batches, check_unicode, opened
from torchweld.training.machine import forced_backend, pick_device
from torchweld.training.tagged import Sentence, Sentences, Tag
from torchweld.training.tagging import ARCHITECTURE

_TOGETHER = 32
_WORD = re.compile(r"\w+(?:[-'.\u2019]\w+)*|[^\w\s]")


@dataclass(frozen=True)
class Tagged:
    """A word of a text, its first character and that behind its last one, and its tag."""

    word: str
    start: int
    end: int
    tag: str
    probability: float


@dataclass(frozen=True)
class Tagger:
    """Tags the words of texts. `spaced`: words stand between spaces; else punctuation is apart."""

    model: BERTForTokenClassification
    tokenizer: Tokenizer
    spaced: bool

    def __call__(self, texts: Sequence[str]) -> list[list[Tagged]]:
        """The words of each text."""
        pattern = re.compile(r"\S+") if self.spaced else _WORD
        found = [list(pattern.finditer(text)) for text in texts]
        words = [Sentence(tuple(match[0] for match in each), ()) for each in found]
        config = self.model.config
        sentences = Sentences(words, self.tokenizer, config.max_position_embeddings, config.labels)
        unknown = "O" if "O" in config.labels else config.labels[0]
        tags = sentences.tags(self.model, _TOGETHER, nullcontext(), unknown)
        return [[_tagged(*pair) for pair in zip(a, b, strict=True)] for a, b in zip(found, tags, strict=True)]


def _tagged(match: re.Match[str], tag: Tag) -> Tagged:
    return Tagged(match[0], match.start(), match.end(), tag.label, round(tag.probability, 4))


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `torchweld tag`; its `func` takes the parsed arguments and returns the exit code."""
    parser = subparsers.add_parser(
        "tag",
        help="tag the words of texts",
        description="Writes a word and its tag a line, and an empty line behind each text. With --json also the "
        "entities, where the tags stand for such.",
    )
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a model, or the --out of a run")
    parser.add_argument("text", nargs="*", metavar="TEXT", help="to tag (default: standard input, line by line)")
    parser.add_argument("--file", metavar="FILE", help="of texts, one a line")
    parser.add_argument("--spaced", action="store_true", help="cut words at spaces alone, not before punctuation")
    parser.add_argument("--json", action="store_true", help="one JSON object a text")
    add_machine_options(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Writes the words of each text that it reads."""
    if args.text and args.file is not None:
        raise UserError("TEXT: expected none beside --file, but got some; tag the one or the other")
    check_unicode("TEXT", args.text)
    device = pick_device(args.device)
    directory = checkpoint.locate(Path(args.checkpoint), to_use=True)
    config, weights = checkpoint.load_model(directory, BERTConfig.from_hugging_face)
    made = checkpoint.read_json(directory / "config.json").get("architectures") or [ARCHITECTURE]
    if ARCHITECTURE not in made or not config.labels:
        raise UserError(
            f"checkpoint {directory}: expected a model of `torchweld fine-tune tag` with id2label, a {ARCHITECTURE}, "
            f"but got another"
        )
    tokenizer = checkpoint.load_tokenizer(directory, config)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    with forced_backend(args.backend, device):
        model = BERTForTokenClassification(config).eval()
        model.load_hugging_face(weights)
        tagger = Tagger(model.to(device), tokenizer, args.spaced)
        if args.text:
            _write([args.text], tagger, args.json)
        else:
            with opened(args.file or "-") as lines:
                if lines.isatty():
                    sys.stderr.write("a text a line; Ctrl-D ends\n")
                _write(batches(lines), tagger, args.json)
    return 0


def _write(several: Iterable[list[str]], tagger: Tagger, as_json: bool) -> None:
    by_entity = scores.has_entities(tagger.model.config.labels)
    for texts in several:
        for text, words in zip(texts, tagger(texts), strict=True):
            if as_json:
                values: dict[str, Any] = {"text": text, "words": [asdict(word) for word in words]}
                if by_entity:
                    values["entities"] = _entities(text, words)
                sys.stdout.write(json.dumps(values, ensure_ascii=False) + "\n")
            else:
                sys.stdout.write("".join(f"{word.word}\t{word.tag}\n" for word in words) + "\n")
        sys.stdout.flush()


def _entities(text: str, words: Sequence[Tagged]) -> list[dict[str, Any]]:
    """In order; `probability`: the least of their words'."""
    found = []
    for kind, first, last in sorted(scores.entities([word.tag for word in words]), key=lambda entity: entity[1]):
        start, end = words[first].start, words[last - 1].end
        least = min(word.probability for word in words[first:last])
        found.append({"kind": kind, "text": text[start:end], "start": start, "end": end, "probability": least})
    return found
