"""`torchweld answer`: where a text has the answers to questions, by a BERT that was fine-tuned for it."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from torchweld.errors import UserError
from torchweld.models.bert import BERTConfig
from torchweld.models.bert_tokens import BERTForQuestionAnswering
from torchweld.training import checkpoint
from torchweld.training.answering import UNANSWERABLE
from torchweld.training.arguments import add_machine_options, add_window_options
from torchweld.training.lines import AT_ONCE, batches, check_unicode, opened
from torchweld.training.machine import forced_backend, pick_device
from torchweld.training.questions import Question
from torchweld.training.spans import Cut, Found, Windows

_TOGETHER = 32


@dataclass(frozen=True)
class Reader:
    """Answers questions on one text. `unanswerable`: it may say that the text has no answer."""

    model: BERTForQuestionAnswering
    tokenizer: Tokenizer
    cut: Cut
    unanswerable: bool

    def __call__(self, context: str, texts: Sequence[str]) -> list[Found]:
        """An answer to each question."""
        asked = Windows([Question(text, context) for text in texts], self.tokenizer, self.cut)
        return asked.answers(self.model, _TOGETHER, nullcontext(), self.unanswerable)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `torchweld answer`; its `func` takes the parsed arguments and returns the exit code."""
    parser = subparsers.add_parser(
        "answer",
        help="find the answers to questions in a text",
        description="Writes for each question the part of the text that answers it, its probability, and the question. "
        "A long text is read in windows. A model that has learned from unanswerable questions may leave the answer "
        "empty.",
    )
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a model, or the --out of a run")
    parser.add_argument("question", nargs="*", metavar="QUESTION", help="(default: standard input, line by line)")
    parser.add_argument("--context", metavar="FILE", help="the text (default with QUESTION or --file: standard input)")
    parser.add_argument("--text", metavar="TEXT", help="the text itself, in place of --context")
    parser.add_argument("--file", metavar="FILE", help="of questions, one a line")
    parser.add_argument(
        "--unanswerable",
        action=argparse.BooleanOptionalAction,
        help="whether an answer may be empty (default: as the model has learned)",
    )
    add_window_options(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object a question")
    add_machine_options(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Writes a line for each question that it reads."""
    if args.question and args.file is not None:
        raise UserError("QUESTION: expected none beside --file, but got some; ask the ones or the others")
    if args.text is not None and args.context is not None:
        raise UserError("--text: expected none beside --context, but got one; give one text")
    check_unicode("QUESTION, --text", [*args.question, args.text or ""])
    if not args.question and args.text is None and "-" == (args.file or "-") == (args.context or "-"):
        raise UserError(
            "answer: expected a text beside the questions from standard input, but got none; name it with --context, "
            "or give the questions as arguments"
        )
    device = pick_device(args.device)
    directory = checkpoint.locate(Path(args.checkpoint), to_use=True)
    config, weights = checkpoint.load_model(directory, BERTConfig.from_hugging_face)
    if "qa_outputs.weight" not in weights:
        raise UserError(
            f"checkpoint {directory}: expected a model of `torchweld fine-tune answer`, with qa_outputs, but got one "
            f"without"
        )
    tokenizer = checkpoint.load_tokenizer(directory, config)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    cut = Cut.of(args.window, args.stride, config)
    unanswerable = args.unanswerable
    if unanswerable is None:
        unanswerable = checkpoint.read_json(directory / "config.json").get(UNANSWERABLE) is True
    context = args.text if args.text is not None else _read(args.context or "-")
    if not context.strip():
        raise UserError("--context: expected a text, but it is empty")
    with forced_backend(args.backend, device), _asked(args) as asked:
        model = BERTForQuestionAnswering(config).eval()
        model.load_hugging_face(weights)
        reader = Reader(model.to(device), tokenizer, cut, unanswerable)
        for texts in asked:
            _write(context, texts, reader, args.json)
    return 0


def _read(path: str) -> str:
    with opened(path) as lines:
        return lines.read()


@contextmanager
def _asked(args: argparse.Namespace) -> Iterator[Iterator[list[str]]]:
    """The questions, some at once."""
    if args.question:
        yield iter([args.question[i : i + AT_ONCE] for i in range(0, len(args.question), AT_ONCE)])
        return
    with opened(args.file or "-") as lines:
        if lines.isatty():
            sys.stderr.write("a question a line; Ctrl-D ends\n")
        yield batches(lines)


def _write(context: str, texts: Sequence[str], reader: Reader, as_json: bool) -> None:
    """An empty line for an empty question."""
    found = iter(reader(context, [text for text in texts if text.strip()]))
    for text in texts:
        answer = next(found) if text.strip() else None
        if as_json:
            sys.stdout.write(json.dumps({"question": text, **_values(answer)}, ensure_ascii=False) + "\n")
        elif answer is None:
            sys.stdout.write("\n")
        else:
            sys.stdout.write(f"{' '.join(answer.text.split())}\t{answer.probability:.4f}\t{text}\n")
    sys.stdout.flush()


def _values(answer: Found | None) -> dict[str, Any]:
    if answer is None:
        return {}
    place = {"start": answer.start, "end": answer.end} if answer.text else {}
    margin = {"margin": round(answer.margin, 4)} if math.isfinite(answer.margin) else {}  # a text without a token
    return {"answer": answer.text, "probability": round(answer.probability, 4), **margin, **place}
