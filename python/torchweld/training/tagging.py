"""`torchweld fine-tune tag`: a trained BERT learns the tags of words: names, parts of speech, and the like."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.table import Table

from torchweld.errors import UserError
from torchweld.models.bert import BERTConfig
from torchweld.models.bert_tokens import BERTForTokenClassification
from torchweld.training import checkpoint, corpus, scores, tagged
from torchweld.training.findings import Findings
from torchweld.training.labelled import MOST_LABELS, parted
from torchweld.training.program import Batch, Outcome
from torchweld.training.settings import Settings
from torchweld.training.tagged import LAST, Sentence, Sentences, Tag
from torchweld.training.tuning import Tuning, encoder_weights

WORST, AROUND = 5, 3
ARCHITECTURE = "BertForTokenClassification"


@dataclass(frozen=True)
class Words(corpus.Tokenized):
    """Tagged sentences as sequences. `labels`: the names of the tags."""

    digest: str
    labels: tuple[str, ...]
    training: Sentences
    validation: Sentences
    test: Sentences

    @property
    def usual(self) -> str:
        """The tag that most words for training have."""
        return Counter(tag for sentence in self.training.sentences for tag in sentence.tags).most_common(1)[0][0]


@dataclass(frozen=True)
class Tagging(Tuning):
    """The program."""

    unit: str = "nats per word"

    @property
    def defaults(self) -> Mapping[str, str]:
        return {"text": "1", "label": LAST, "test": ""}

    def data(self, settings: Settings, config: BERTConfig, source: Path | None = None) -> Words:
        """The sentences of the files, split and encoded; as in `Program`."""
        if not settings.data:
            raise UserError(f"{self.command}: expected files of words and tags, but got none; name them with --data")
        columns = settings.options
        read = tagged.read_sentences(settings.data, columns["text"], columns["label"])
        own = columns["test"]
        test = tagged.read_sentences([own], columns["text"], columns["label"]) if own else None
        parts = parted(read, lambda sentence: sentence.text, ("sentences", "sentence"), test)
        training = parts[0][: settings.max_samples]
        labels = _labels([*read, *(test or ())], training)
        tokenizer = checkpoint.load_tokenizer(source, config) if source else self.tokenizer
        assert tokenizer is not None
        tokenizer.no_padding()
        tokenizer.no_truncation()
        longest = config.max_position_embeddings
        sequences = [Sentences(part, tokenizer, longest, labels) for part in (training, *parts[1:])]
        if not all(map(len, sequences)):
            raise UserError(
                "--data: expected words that the tokenizer knows as text, but all of a part are empty to it"
            )
        return Words(tokenizer, tagged.digest([*read, *(test or ())]), labels, *sequences)

    def fit(self, settings: Settings, config: BERTConfig, data: Words) -> tuple[Settings, BERTConfig]:
        """A head for the tags, and as many steps as the epochs take."""
        config = replace(config, labels=data.labels, regression=False, dropout=0.0)
        return self.timed(settings, len(data.training)), config

    def model(self, config: BERTConfig, ops: ModuleType) -> BERTForTokenClassification:
        """The checkpoint's encoder under a new head."""
        model = BERTForTokenClassification(config, ops)
        if self.weights:
            model.bert.load_hugging_face(encoder_weights(self.weights, model))
        return model

    def write_config(self, config: BERTConfig, data: Words) -> dict[str, Any]:
        """As in `Program`."""
        return {**config.to_hugging_face(), "architectures": [ARCHITECTURE]}

    def describe(self, data: Words, settings: Settings, config: BERTConfig) -> tuple[str, str]:
        """As in `Program`."""
        sizes = " / ".join(f"{len(part.sentences):,}" for part in (data.training, data.validation, data.test))
        words = sum(len(sentence.words) for sentence in data.training.sentences) / len(data.training.sentences)
        source = f"{len(settings.data or ())} files, {sizes} for training, validation and test, {words:.0f} words each"
        return f"sentences: {source}, {len(data.labels)} tags", f"{settings.batch_size} sentences"

    def baselines(self, data: Words, validation: Sequence[Batch]) -> dict[str, float]:
        """The validation loss of what is said of any word alike."""
        own, checked = (part.batch(range(len(part))).tensors[-1] for part in (data.training, data.validation))
        frequencies = torch.bincount(own, minlength=len(data.labels)).double() / len(own)
        return {"frequencies of the tags": float(-frequencies[checked].log().mean())}

    def show(self, outcome: Outcome, found: Findings) -> None:
        """The test's scores beside those of the baselines, and the words that went most wrong."""
        data, sentences = outcome.data, outcome.data.test.sentences
        tags = data.test.tags(outcome.model, outcome.settings.batch_size, outcome.precision, data.usual)
        own, meant = [[tag.label for tag in each] for each in tags], [list(each.tags) for each in sentences]
        by_entity = scores.has_entities(data.labels)
        others = {
            "each word's most frequent tag": _majority(data.training.sentences, sentences, data.usual),
            f"{data.usual} for all": [[data.usual] * len(each) for each in meant],
        }
        judged = {name: scores.of_tags(said, meant, by_entity) for name, said in others.items()}
        title = f"{sum(map(len, meant)):,} words of {len(meant):,} sentences of the test"
        found.scores(title, {"BERT": scores.of_tags(own, meant, by_entity)}, judged)
        if by_entity:
            found.print(_kinds(own, meant))
        found.print(_worst(tags, sentences))
        found.print(f'try it: echo "Anna went to Oslo." | torchweld tag --checkpoint {outcome.out}')


def _labels(sentences: Sequence[Sentence], training: Sequence[Sentence]) -> tuple[str, ...]:
    """The tags there are, in order.

    Raises:
        UserError: fewer than two, too many, or one that no sentence for training has.
    """
    names = tuple(sorted({tag for sentence in sentences for tag in sentence.tags}))
    if not 2 <= len(names) <= MOST_LABELS:
        raise UserError(
            f"--data: expected 2 to {MOST_LABELS} different tags, but got {len(names)} "
            f"({', '.join(map(repr, names[:3]))}); name their column with --label"
        )
    if absent := set(names) - {tag for sentence in training for tag in sentence.tags}:
        raise UserError(
            f"--data: expected every tag among the sentences for training, but {sorted(absent)[0]!r} is not; give "
            f"more sentences with it, or leave it out"
        )
    return names


def _majority(training: Sequence[Sentence], sentences: Sequence[Sentence], usual: str) -> list[list[str]]:
    """The tag that each word has most often in training; `usual` for a word that is not there."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for sentence in training:
        for word, tag in zip(sentence.words, sentence.tags, strict=True):
            seen[word][tag] += 1
    known = {word: tags.most_common(1)[0][0] for word, tags in seen.items()}
    return [[known.get(word, usual) for word in sentence.words] for sentence in sentences]


def _kinds(said: Sequence[Sequence[str]], meant: Sequence[Sequence[str]]) -> Table:
    wanted = Counter(kind for tags in meant for kind, _, _ in scores.entities(tags))
    table = Table("", "precision", "recall", "F1", "of the test", title="kinds of entities one by one")
    for kind, count in sorted(wanted.items()):
        each = scores.of_entities(said, meant, kind)
        numbers = (each[name] for name in ("precision", "recall", "F1 of entities"))
        table.add_row(kind, *(f"{number:.3f}" for number in numbers), str(count))
    return table


def _worst(tags: Sequence[Sequence[Tag]], sentences: Sequence[Sentence]) -> Table:
    """The wrong tags that the model was surest of."""
    wrong = [
        (tag, i, sentence)
        for said, sentence in zip(tags, sentences, strict=True)
        for i, tag in enumerate(said)
        if tag.label != sentence.tags[i]
    ]
    table = Table("word", "right", "tagged", "probability", "among", title="the most wrong")
    for tag, i, sentence in sorted(wrong, key=lambda row: -row[0].probability)[:WORST]:
        among = " ".join(sentence.words[max(0, i - AROUND) : i + AROUND + 1])
        table.add_row(sentence.words[i], sentence.tags[i], tag.label, f"{tag.probability:.3f}", among)
    return table
