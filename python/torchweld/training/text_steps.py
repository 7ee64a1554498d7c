"""What `torchweld prepare` does to a text: white space, words, stop words, stems, language, tokens of one length."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from torchweld.errors import UserError
from torchweld.training import checkpoint, corpus
from torchweld.training.extras import needed

EXTRA = "prepare"
SURE = 0.9  # a text is of another language where that is at least so likely
PAD = "[PAD]"
LEARNED = ("bpe", "wordpiece")
_PADS = (PAD, "<pad>", corpus.END)  # BERT's, mBART's, and the one token that GPT-2 has for it
_WORD = re.compile(r"\w+(?:['\u2019]\w+)*|[^\w\s]")


def normalised(text: str) -> str:
    """Of composed characters (NFC), without control characters and halves of pairs of UTF-16, white space single."""
    text = unicodedata.normalize("NFC", text).replace("\ufeff", "")
    kept = (c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cs"))
    return " ".join("".join(kept).split())


def words(text: str) -> list[str]:
    """Words in lower case, and every other mark by itself."""
    return _WORD.findall(text.lower())


def stop_words(language: str) -> frozenset[str]:
    """The words that say little in a language.

    Raises:
        UserError: the library is missing, or does not know the language.
    """
    library = needed("stop_words", "stop-words", EXTRA, "--stop-words")
    known = sorted(library.AVAILABLE_LANGUAGES)
    if language not in known:
        raise UserError(f"--stop-words: expected one of {', '.join(known)}, but got {language!r}")
    return frozenset(word.lower() for word in library.get_stop_words(language))


def without(stopped: frozenset[str], found: Sequence[str]) -> list[str]:
    """The words that are none of them, however their apostrophes are written."""
    return [word for word in found if word.replace("\u2019", "'") not in stopped]


def stemmer(language: str) -> Callable[[list[str]], list[str]]:
    """From words to their stems.

    Raises:
        UserError: the library is missing, or does not know the language.
    """
    library = needed("snowballstemmer", "snowballstemmer", EXTRA, "--stem")
    known = library.algorithms()
    if language not in known:
        raise UserError(f"--stem: expected one of {', '.join(known)}, but got {language!r}")
    return library.stemmer(language).stemWords


def foreign(languages: Sequence[str]) -> list[Callable[[str], str | None]]:
    """For each side of a pair, or a text: the language that it is in, if it is surely not the wanted one.

    A text may be in any language, a side of a pair only in one of the two.

    Raises:
        UserError: the library is missing, or does not know a language.
    """
    library = needed("py3langid.langid", "py3langid", EXTRA, "--language")
    identifier: Any = library.LanguageIdentifier.from_model_file(library.MODEL_FILE, norm_probs=True)
    known = sorted(map(str, identifier.labels))
    if unknown := [language for language in languages if language not in known]:
        raise UserError(f"--language: expected codes out of {', '.join(known)}, but got {unknown[0]!r}")
    if len(languages) > 1:
        identifier.set_languages(list(languages))

    def judge(wanted: str) -> Callable[[str], str | None]:
        def of(text: str) -> str | None:
            found, sure = identifier.classify(text)
            return str(found) if found != wanted and sure >= SURE else None

        return of

    return [judge(language) for language in languages]


class Tokens:
    """What cuts texts into tokens. `tokenizer`: None for words."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self.pad: int | str = PAD
        if tokenizer is not None:
            tokenizer.no_padding()
            tokenizer.no_truncation()

    @classmethod
    def named(cls, name: str, vocab_size: int, texts: Sequence[str], pairs: bool) -> Tokens:
        """`words`, a kind out of `LEARNED`, which learns from `texts`, or the tokenizer in the directory `name`.

        Raises:
            UserError: there is none.
        """
        if name == "words":
            return cls(None)
        if name == "wordpiece":
            return cls(corpus.train_wordpiece(texts, vocab_size))
        if name == "bpe":
            learn = corpus.train_joint_tokenizer if pairs else corpus.train_tokenizer
            return cls(learn(texts, vocab_size))
        if not Path(name).is_dir():
            raise UserError(
                f"--tokenize: expected words, {', '.join(LEARNED)} or the directory of a model, but got {name!r}"
            )
        tokenizer = checkpoint.read_tokenizer(checkpoint.locate(Path(name), to_use=True))
        return cls(corpus.with_marks_as_text(tokenizer) if pairs else tokenizer)

    def limit(self, length: int) -> None:
        """Cuts behind so many tokens, special ones among them.

        Raises:
            UserError: there is no token to pad with, or no room beside the special ones.
        """
        if self.tokenizer is None:
            return
        pad = next((found for name in _PADS if (found := self.tokenizer.token_to_id(name)) is not None), None)
        if pad is None:
            raise UserError(f"--length: expected a tokenizer with one of {', '.join(_PADS)} to pad with, but got none")
        special = self.tokenizer.num_special_tokens_to_add(False)
        if length <= special:
            raise UserError(f"--length: expected more than the {special} special tokens of a text, but got {length}")
        self.pad = pad
        self.tokenizer.enable_truncation(length)

    def of(self, texts: Sequence[str], length: int | None) -> tuple[list[list[Any]], list[bool]]:
        """The tokens of each text, words or numbers, and whether they were cut."""
        if self.tokenizer is None:
            whole = [text.split(" ") for text in texts]
            return [row[:length] for row in whole], [length is not None and len(row) > length for row in whole]
        encodings = self.tokenizer.encode_batch(list(texts))
        return [encoding.ids for encoding in encodings], [bool(encoding.overflowing) for encoding in encodings]
