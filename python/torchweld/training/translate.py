"""`torchweld translate`: lines of text, of a file or of standard input, by a trained encoder-decoder."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer

from torchweld.errors import UserError
from torchweld.models.seq2seq import Seq2Seq, Seq2SeqConfig
from torchweld.models.translating import alignment, generate
from torchweld.training import checkpoint
from torchweld.training.arguments import add_machine_options, number, whole
from torchweld.training.corpus import CLOSE, special_token, with_marks_as_text
from torchweld.training.lines import AT_ONCE, batches, check_unicode, opened
from torchweld.training.machine import forced_backend, pick_device
from torchweld.training.packing import pack

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

# Where a long sentence is cut, the best place first: after the end of a sentence, at a comma, between words.
_CUTS = [re.compile(p) for p in (r"(?<=[.!?;:])\s+|(?<=[。！？；])", r"(?<=,)\s+|(?<=[，、])", r"\s+")]  # noqa: RUF001
_GROWTH, _MORE = 2, 16  # a translation has at most so many times the tokens of its source, and so many more


@dataclass(frozen=True)
class Translator:
    """A model with its tokenizer. `beams`, `length_penalty`: as in `generate`."""

    model: Seq2Seq
    tokenizer: Tokenizer
    beams: int = 1
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        special_token(self.tokenizer, CLOSE)
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        with_marks_as_text(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """The tokens of a sentence, closed by </s>."""
        return list(self.tokenizer.encode(text).ids)

    def pieces(self, text: str, cuts: Sequence[re.Pattern[str]] = _CUTS) -> list[str]:
        """The text in pieces of at most half the model's positions in tokens, so that translations have room."""
        text = " ".join(text.split())
        if self._fits(text) or len(text) < 2:
            return [text] if text else []
        if not cuts:  # one long word
            return self.pieces(text[: len(text) // 2], ()) + self.pieces(text[len(text) // 2 :], ())
        joined: list[str] = []
        for part in cuts[0].split(text):
            longer = f"{joined[-1]} {part}" if joined else part
            joined[-1:] = [longer] if self._fits(longer) or not joined else [joined[-1], part]
        return [piece for part in joined for piece in self.pieces(part, cuts[1:])]

    def _fits(self, text: str) -> bool:
        return len(self.encode(text)) <= self.model.config.max_position_embeddings // 2

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """The translations; an empty one for an empty text."""
        pieces = [self.pieces(text) for text in texts]
        flat = [self.encode(piece) for several in pieces for piece in several]
        # Sentences of like lengths end after about as many steps.
        order = sorted(range(len(flat)), key=lambda i: len(flat[i]))
        said = dict.fromkeys(order, "")
        for start in range(0, len(order), AT_ONCE):
            chosen = order[start : start + AT_ONCE]
            said |= zip(chosen, self._generate([flat[i] for i in chosen]), strict=True)
        rest = iter([said[i] for i in range(len(flat))])
        return [" ".join(next(rest) for _ in several) for several in pieces]

    def _generate(self, sources: list[list[int]]) -> Iterable[str]:
        device, limit = next(self.model.parameters()).device, self.model.config.max_position_embeddings
        tokens, bounds = (tensor.to(device) for tensor in pack(sources))
        most = (_GROWTH * bounds.diff().long() + _MORE).clamp(max=limit)
        found = generate(self.model, tokens, bounds, most, beams=self.beams, length_penalty=self.length_penalty)
        return (text.strip() for text in self.tokenizer.decode_batch(found))

    def attention_map(self, text: str, path: Path) -> None:
        """Draws how much each token of the first piece's translation attended to each of its source, as a PNG."""
        if not (piece := "".join(self.pieces(text)[:1])):
            raise UserError("--attention-map: expected a text that is not empty")
        source = self.encode(piece)
        target = self.encode(self([piece])[0])[: self.model.config.max_position_embeddings]
        device = next(self.model.parameters()).device
        start = self.model.config.decoder_start_token_id
        inputs = torch.tensor([start, *target[:-1]], device=device)
        weights = alignment(self.model, torch.tensor(source, device=device), inputs).cpu()
        figure = import_module("matplotlib.figure").Figure(
            figsize=(2 + 0.4 * len(source), 1.5 + 0.3 * len(target)), layout="constrained"
        )
        axes = figure.add_subplot(xlabel="source", ylabel="translation", title="attention of the last layer")
        image = axes.imshow(weights, cmap="viridis", vmin=0.0, aspect="auto")
        axes.set_xticks(range(len(source)), [self._shown(token) for token in source], rotation=60)
        axes.set_yticks(range(len(target)), [self._shown(token) for token in target])
        figure.colorbar(image)
        try:
            figure.savefig(path, format="png", dpi=120)
        except OSError as error:
            raise UserError(f"--attention-map {path}: expected a file to write, but got: {error.strerror}") from None

    def _shown(self, token: int) -> str:
        return str(self.tokenizer.decode([token], skip_special_tokens=False)).replace("$", r"\$")


def add_parser(subparsers: Subparsers) -> None:
    """Adds `torchweld translate`; its `func` takes the parsed arguments and returns the exit code."""
    parser = subparsers.add_parser(
        "translate",
        help="translate texts, a file or standard input",
        description="Writes a translation for each text or line, an empty line for an empty one. A text longer than "
        "half the model's positions is translated in pieces, cut behind punctuation. At a terminal each line has its "
        "answer at once.",
    )
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a model, or the --out of a run")
    parser.add_argument("text", nargs="*", metavar="TEXT", help="to translate (default: standard input, line by line)")
    parser.add_argument("--file", metavar="FILE", help="of texts, one a line")
    parser.add_argument(
        "--beam", type=whole(1), default=1, metavar="N", help="translations that grow side by side (default: 1, greedy)"
    )
    parser.add_argument(
        "--length-penalty",
        type=number(-10.0, 10.0),
        default=1.0,
        metavar="A",
        help="of --beam: the largest log-probability / length^A wins, so a larger A favours longer ones (default: 1)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a text")
    parser.add_argument(
        "--attention-map", metavar="PNG", help="draw which words of the first TEXT each word comes from"
    )
    add_machine_options(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Writes a line for each text that it reads."""
    if args.text and args.file is not None:
        raise UserError("TEXT: expected none beside --file, but got some; translate the one or the other")
    if args.attention_map is not None:
        if not args.text:
            raise UserError("--attention-map: expected a TEXT on the command line to draw it for, but got none")
        if find_spec("matplotlib") is None:
            raise UserError("--attention-map needs matplotlib: pip install torchweld[plot]")
    check_unicode("TEXT", args.text)
    device = pick_device(args.device)
    directory = checkpoint.locate(Path(args.checkpoint), to_use=True)
    config, weights = checkpoint.load_model(directory, Seq2SeqConfig.from_hugging_face)
    tokenizer = checkpoint.load_tokenizer(directory, config)
    with forced_backend(args.backend, device):
        model = Seq2Seq(config).eval()
        model.load_hugging_face(weights)
        translator = Translator(model.to(device), tokenizer, args.beam, args.length_penalty)
        if args.text:
            _write(args.text, translator(args.text), args.json)
        else:
            with opened(args.file or "-") as lines:
                if lines.isatty():
                    sys.stderr.write("a sentence a line; Ctrl-D ends\n")
                for texts in batches(lines):
                    _write(texts, translator(texts), args.json)
        if args.attention_map is not None:
            translator.attention_map(args.text[0], Path(args.attention_map))
    return 0


def _write(texts: Iterable[str], translations: Iterable[str], as_json: bool) -> None:
    for text, said in zip(texts, translations, strict=True):
        line = json.dumps({"text": text, "translation": said}, ensure_ascii=False) if as_json else said
        sys.stdout.write(line + "\n")
    sys.stdout.flush()
