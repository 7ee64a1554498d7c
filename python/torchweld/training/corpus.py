"""Text to tokens: where the documents come from, the byte-level BPE trained on them, and the split.

Documents are shuffled in a fixed order, joined, and cut once: the last tenth of the tokens is for validation. So many
files are split between files and a single one between its beginning and its end, whatever the seed of the training.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import sysconfig
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from inspect import cleandoc
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from torchweld.errors import UserError

END = "<|endoftext|>"
SEPARATOR, MASK = "[SEP]", "[MASK]"
BERT_TOKENS = ["[PAD]", "[UNK]", "[CLS]", SEPARATOR, MASK]
CLOSE = "</s>"
MBART_TOKENS = ["<s>", "<pad>", CLOSE, "<unk>"]
_DOCSTRING = re.compile(r'^[ \t]*[rRuU]?"""(.*?)"""', re.MULTILINE | re.DOTALL)  # parsing takes ten times as long
_CODE = re.compile(r"^(?:import|from|def|class) ", re.MULTILINE)
VALIDATION = 0.1

# Directories of the standard library without text that anyone wrote for reading: tests, and tables (encodings).
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}


def standard_library() -> list[str]:
    """The Python sources of the running interpreter's standard library, and the language reference within pydoc."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py")):
        if not _SKIPPED.intersection(path.relative_to(root).parts) and not path.name.startswith("_sysconfigdata"):
            documents.append(path.read_text(encoding="utf-8", errors="replace"))
    with suppress(ModuleNotFoundError):  # some minimal distributions leave it out
        topics = import_module("pydoc_data.topics").topics
        documents += [topics[name] for name in sorted(topics)]
    if not documents:
        raise UserError(
            f"text: expected the sources of the standard library in {root}, but got none; give text files with --data"
        )
    return documents


def standard_library_prose() -> list[str]:
    """What the standard library says in English: its docstrings, and the language reference within pydoc."""
    documents = []
    for source in standard_library():
        found = [cleandoc(text) for text in _DOCSTRING.findall(source)]
        if found or _CODE.search(source) is None:
            documents.append("\n\n".join(found) or source)
    return documents


def read_files(paths: Iterable[str | Path]) -> list[str]:
    """The contents of UTF-8 text files, one document each.

    Raises:
        UserError: a file is missing, empty, unreadable or not text.
    """
    documents = []
    for path in paths:
        try:
            text = Path(path).read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(
                f"--data {path}: expected UTF-8 text, but got byte 0x{error.object[error.start]:02x} at offset "
                f"{error.start}; convert the file to UTF-8"
            ) from None
        except OSError as error:
            raise UserError(f"--data {path}: expected a readable text file, but got: {error.strerror}") from None
        if "\0" in text:
            raise UserError(f"--data {path}: expected text, but got a binary file (it has NUL bytes)")
        if not text.strip():
            raise UserError(f"--data {path}: expected text, but the file is empty")
        documents.append(text)
    return documents


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al., arXiv:1508.07909, over bytes as in GPT-2): any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def train_joint_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """mBART's: one byte-level BPE for both languages; a sentence is closed by </s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # a word is the same at the beginning
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=MBART_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {CLOSE}", special_tokens=[(CLOSE, special_token(tokenizer, CLOSE))]
    )
    return with_marks_as_text(tokenizer)


def with_marks_as_text(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, for which a "</s>" in a sentence is text; `tokenizer.json` does not say so."""
    tokenizer.encode_special_tokens = True
    return tokenizer


def train_wordpiece(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """BERT's: lower-case words, and pieces of the rare ones; a text goes between [CLS] and [SEP]."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=BERT_TOKENS, show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    separator, start = (special_token(tokenizer, token) for token in (SEPARATOR, "[CLS]"))
    tokenizer.post_processor = processors.BertProcessing((SEPARATOR, separator), ("[CLS]", start))
    return tokenizer


def special_token(tokenizer: Tokenizer, token: str) -> int:
    """The number of a special token.

    Raises:
        UserError: the tokenizer does not have it.
    """
    number = tokenizer.token_to_id(token)
    if number is None:
        kind = {END: "a GPT-2", CLOSE: "an mBART"}.get(token, "a BERT")
        raise UserError(f"tokenizer.json: expected {kind} tokenizer with a token {token}, but got one without")
    return int(number)


def end_of_text(tokenizer: Tokenizer) -> int:
    """GPT-2's token between documents.

    Raises:
        UserError: the tokenizer has none.
    """
    return special_token(tokenizer, END)


@dataclass(frozen=True)
class Tokenized:
    """Data of text, whose tokenizer goes with the model."""

    tokenizer: Tokenizer

    @property
    def files(self) -> Mapping[str, str]:
        """As in `Data`."""
        return {"tokenizer.json": self.tokenizer.to_str(pretty=True)}


@dataclass(frozen=True)
class Corpus(Tokenized):
    """Tokens ready for training.

    Attributes:
        digest: of the text, so that a resumed run can tell that it is still the same.
        train, validation: (tokens), int32.
    """

    digest: str
    train: Tensor
    validation: Tensor

    def batch(self, size: int, context: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Training inputs and targets, each (size, context): a function of seed and step alone, so resuming is free."""
        last = len(self.train) - context
        starts = np.random.default_rng((seed, step)).integers(0, last, size)
        return windows(self.train, starts.tolist(), context)

    def validation_batches(self, size: int, context: int, tokens: int) -> list[tuple[Tensor, Tensor]]:
        """The same windows every time: about `tokens` of them, spread evenly over the validation text."""
        last = len(self.validation) - context - 1
        count = max(1, min(tokens, last) // context)
        starts = np.linspace(0, last, count, dtype=np.int64).tolist()
        return [windows(self.validation, starts[i : i + size], context) for i in range(0, count, size)]


def windows(tokens: Tensor, starts: Sequence[int], context: int) -> tuple[Tensor, Tensor]:
    """Inputs and the tokens that follow them, each (len(starts), context) of int64."""
    both = torch.stack([tokens[start : start + context + 1] for start in starts]).long()
    return both[:, :-1], both[:, 1:]


def unigram_entropy(batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Entropy in nats of the targets' own token frequencies: no model that ignores the context has a lower loss."""
    counts = torch.bincount(torch.cat([targets.flatten() for _, targets in batches])).double()
    p = counts[counts > 0] / counts.sum()
    return float(-(p * p.log()).sum())


def load_corpus(documents: list[str], vocab_size: int, tokenizer: Tokenizer | None = None, end: str = END) -> Corpus:
    """Encodes `documents`, with a tokenizer trained on them unless one is given; both are cached between runs.

    `end`: the token that closes each document, GPT-2's or BERT's; the tokenizer is of the same kind.
    """
    random.Random(0).shuffle(documents)
    learn = train_tokenizer if end == END else train_wordpiece
    tokenizer, digest, tokens = load_tokens(documents, vocab_size, tokenizer, end, lambda: learn(documents, vocab_size))
    cut = len(tokens) - int(len(tokens) * VALIDATION)
    return Corpus(tokenizer, digest, tokens[:cut], tokens[cut:])


def load_tokens(
    documents: list[str], vocab_size: int, tokenizer: Tokenizer | None, end: str, learn: Callable[[], Tokenizer]
) -> tuple[Tokenizer, str, Tensor]:
    """`tokenizer`, or the one that `learn` makes; a digest of the documents; and their tokens, each closed by `end`.

    Tokenizer and tokens are cached between runs.
    """
    text = hashlib.sha256("\0".join(documents).encode())
    digest = text.hexdigest()
    text.update(f"{vocab_size} {end} {tokenizer.to_str() if tokenizer else ''}".encode())
    cached = cache_directory() / f"tokens-{text.hexdigest()[:32]}.safetensors"
    found = _read_cache(cached)
    if found is None:
        tokenizer = tokenizer or learn()
        tokens = _encode(tokenizer, documents, special_token(tokenizer, end))
        _write_cache(cached, tokenizer, tokens)
    else:
        tokenizer, tokens = found
    return tokenizer, digest, tokens


def _encode(tokenizer: Tokenizer, documents: list[str], last: int) -> Tensor:
    """The documents' tokens, each document closed by `last`."""
    end = np.array([last], dtype=np.int32)
    parts = []
    for encoding in tokenizer.encode_batch_fast(documents, add_special_tokens=False):
        parts += [np.array(encoding.ids, dtype=np.int32), end]
    return torch.from_numpy(np.concatenate(parts))


def cache_directory() -> Path:
    """By the XDG base directory rule, which ignores a relative path."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "torchweld"


def _read_cache(path: Path) -> tuple[Tokenizer, Tensor] | None:
    try:
        with safe_open(path, framework="pt") as file:
            return Tokenizer.from_str(file.metadata()["tokenizer"]), file.get_tensor("tokens")
    except (OSError, SafetensorError):  # not there yet, or damaged: it is made again
        return None


def _write_cache(path: Path, tokenizer: Tokenizer, tokens: Tensor) -> None:
    aside = path.with_suffix(f".{os.getpid()}")
    with suppress(OSError, SafetensorError):  # without a cache the next run takes a few seconds longer, nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file({"tokens": tokens}, aside, metadata={"tokenizer": tokenizer.to_str()})
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
