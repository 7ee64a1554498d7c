"""`torchweld fine-tune classify` and `regress`: a trained BERT learns what texts are labelled with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor

from torchweld.errors import UserError
from torchweld.models.bert import BERTConfig, BERTForSequenceClassification
from torchweld.training import bag_of_words, checkpoint, corpus, scores
from torchweld.training.findings import Findings
from torchweld.training.labelled import Rows, label_names, numbers, read_rows, split
from torchweld.training.packing import encode, pack
from torchweld.training.program import Batch, Outcome
from torchweld.training.settings import Settings
from torchweld.training.tuning import Examples, Tuning, encoder_weights, outputs

WORST = 5


@dataclass(frozen=True)
class Part(Examples):
    """Training, validation or test: texts, their tokens, and targets as numbers or as labels' numbers."""

    rows: Rows
    tokens: list[list[int]]
    targets: Tensor

    @property
    def lengths(self) -> list[int]:
        """As in `Examples`."""
        return [len(tokens) for tokens in self.tokens]

    def batch(self, indices: Sequence[int]) -> Batch:
        """As in `Examples`."""
        tokens, bounds = pack([self.tokens[i] for i in indices])
        tensors = (tokens, torch.zeros_like(tokens), bounds, self.targets[list(indices)])
        return Batch(tensors, {"loss": len(indices)}, len(tokens))


@dataclass(frozen=True)
class Labelled(corpus.Tokenized):
    """Labelled texts. `labels`: their names; of regression the column's."""

    digest: str
    labels: tuple[str, ...]
    training: Part
    validation: Part
    test: Part


@dataclass(frozen=True)
class FineTune(Tuning):
    """The program: classify or regress."""

    architecture: str = "BertForSequenceClassification"

    @property
    def unit(self) -> str:
        return "squared error" if self.regression else "nats per text"

    @property
    def regression(self) -> bool:
        """Whether numbers are learned, and not labels."""
        return self.task == "regress"

    @property
    def defaults(self) -> Mapping[str, str]:
        return {"text": "text", "label": "label"}

    def data(self, settings: Settings, config: BERTConfig, source: Path | None = None) -> Labelled:
        """The rows of the files, split and encoded; as in `Program`."""
        if not settings.data:
            raise UserError(f"{self.command}: expected files of texts and labels, but got none; name them with --data")
        columns = settings.options
        rows = read_rows(settings.data, columns["text"], columns["label"])
        predicted = "score" if columns["label"].isdigit() else columns["label"]
        labels = (predicted,) if self.regression else label_names(rows)
        tokenizer = checkpoint.load_tokenizer(source, config) if source else self.tokenizer
        assert tokenizer is not None
        tokenizer.no_padding()
        tokenizer.enable_truncation(config.max_position_embeddings)
        training, validation, test = split(rows)
        training = training.part(range(min(len(training), settings.max_samples or len(training))))
        parts = [self._part(part, labels, tokenizer) for part in (training, validation, test)]
        if not self.regression and (absent := set(labels) - set(parts[0].rows.labels)):
            raise UserError(
                f"--data: expected every label among the texts for training, but {sorted(absent)[0]!r} is not; give "
                f"more texts with it, or leave it out"
            )
        return Labelled(tokenizer, rows.digest, labels, *parts)

    def _part(self, rows: Rows, labels: tuple[str, ...], tokenizer: Tokenizer) -> Part:
        if self.regression:
            targets = torch.tensor(numbers(rows))
        else:
            index = {label: i for i, label in enumerate(labels)}
            targets = torch.tensor([index[label] for label in rows.labels])
        return Part(rows, encode(tokenizer, rows.texts), targets)

    def fit(self, settings: Settings, config: BERTConfig, data: Labelled) -> tuple[Settings, BERTConfig]:
        """A head for the labels, and as many steps as the epochs take."""
        config = replace(config, labels=data.labels, regression=self.regression, dropout=0.0)
        return self.timed(settings, len(data.training)), config

    def model(self, config: BERTConfig, ops: ModuleType) -> BERTForSequenceClassification:
        """The checkpoint's encoder under a new head."""
        model = BERTForSequenceClassification(config, ops)
        if self.weights:
            model.bert.load_hugging_face(encoder_weights(self.weights, model))
        return model

    def write_config(self, config: BERTConfig, data: Labelled) -> dict[str, Any]:
        """As in `Program`."""
        return {**config.to_hugging_face(), "architectures": [self.architecture]}

    def describe(self, data: Labelled, settings: Settings, config: BERTConfig) -> tuple[str, str]:
        """As in `Program`."""
        sizes = f"{len(data.training):,} / {len(data.validation):,} / {len(data.test):,}"
        what = "numbers" if self.regression else f"{len(data.labels)} labels"
        mean = sum(map(len, data.training.tokens)) / len(data.training)
        source = f"{len(settings.data or ())} files, {sizes} for training, validation and test"
        return f"texts: {source}, {mean:.0f} tokens each, {what}", f"{settings.batch_size} texts"

    def baselines(self, data: Labelled, validation: Sequence[Batch]) -> dict[str, float]:
        """The validation loss of what is said of any text alike."""
        targets, own = data.validation.targets, data.training.targets
        if self.regression:
            return {"mean of the training texts": float((targets - own.mean()).square().mean())}
        frequencies = torch.bincount(own, minlength=len(data.labels)).double() / len(own)
        return {"frequencies of the training texts": float(-frequencies[targets].log().mean())}

    def show(self, outcome: Outcome, found: Findings) -> None:
        """The test's scores beside those of the baselines, and the texts that went most wrong."""
        data, test = outcome.data, outcome.data.test
        own = torch.stack(outputs(outcome.model, test, outcome.settings.batch_size, outcome.precision))
        others = {"bag of words": self._bag_of_words(data), "the same for all": self._constant(data)}
        judge = scores.of_numbers if self.regression else scores.of_labels
        judged = {name: judge(said, test.targets) for name, said in others.items()}
        found.scores(f"{len(test):,} texts of the test", {"BERT": judge(own, test.targets)}, judged)
        if not self.regression and len(data.labels) <= scores.MOST_CONFUSED:
            found.print(scores.confusion(own.argmax(1), test.targets, data.labels))
        found.print(self._worst(own, test, data.labels))
        found.print(f'try it: echo "What a lovely day!" | torchweld classify --checkpoint {outcome.out}')

    def _bag_of_words(self, data: Labelled) -> Tensor:
        width = len(data.labels)
        pairs = []
        for part in (data.training, data.validation):
            targets = part.targets[:, None] if self.regression else torch.eye(width)[part.targets]
            pairs.append((part.rows.texts, targets.float()))
        return bag_of_words.predict(pairs[0], pairs[1], data.test.rows.texts)

    def _constant(self, data: Labelled) -> Tensor:
        own, count = data.training.targets, len(data.test)
        if self.regression:
            return own.mean().expand(count, 1)
        return torch.bincount(own, minlength=len(data.labels)).float().expand(count, -1)

    def _worst(self, own: Tensor, test: Part, labels: tuple[str, ...]) -> Table:
        if self.regression:
            errors, said = (own[:, 0] - test.targets).abs(), [f"{value:.2f}" for value in own[:, 0].tolist()]
        else:
            errors = torch.nn.functional.cross_entropy(own, test.targets, reduction="none")
            said = [labels[i] for i in own.argmax(1).tolist()]
        table = Table("labelled", "predicted", "text", title="the most wrong")
        for i in errors.topk(min(WORST, len(test))).indices.tolist():
            table.add_row(test.rows.labels[i], said[i], test.rows.texts[i])
        return table
