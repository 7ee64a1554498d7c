"""`torchweld fine-tune answer`: a trained BERT learns where a context has the answer to a question, as in SQuAD."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.table import Table

from torchweld.errors import UserError
from torchweld.models.bert import BERTConfig
from torchweld.models.bert_tokens import BERTForQuestionAnswering
from torchweld.training import checkpoint, corpus, questions, scores
from torchweld.training.findings import Findings
from torchweld.training.nearby_words import NearbyWords
from torchweld.training.program import Batch, Outcome
from torchweld.training.questions import Question
from torchweld.training.settings import Settings
from torchweld.training.spans import Cut, Found, Windows
from torchweld.training.tuning import Tuning, encoder_weights

WORST = 5
UNANSWERABLE = "unanswerable"  # a key of config.json: whether the model may say that there is no answer


@dataclass(frozen=True)
class Asked(corpus.Tokenized):
    """Questions as sequences. `unanswerable`: some of those for training are."""

    digest: str
    training: Windows
    validation: Windows
    test: Windows

    @property
    def unanswerable(self) -> bool:
        """Whether there are questions without an answer to learn from."""
        return not all(question.answers for question in self.training.questions)


@dataclass(frozen=True)
class Answering(Tuning):
    """The program."""

    unit: str = "nats per end of an answer"
    architecture: str = "BertForQuestionAnswering"

    @property
    def defaults(self) -> Mapping[str, str]:
        return {"test": "", "window": "", "stride": ""}

    def data(self, settings: Settings, config: BERTConfig, source: Path | None = None) -> Asked:
        """The questions of the files, split and encoded; as in `Program`."""
        if not settings.data:
            raise UserError(f"{self.command}: expected files of SQuAD's JSON, but got none; name them with --data")
        chosen = settings.options
        cut = Cut.of(chosen["window"], chosen["stride"], config)
        read = questions.read_questions(settings.data)
        test = questions.read_questions([chosen["test"]]) if chosen["test"] else None
        parts = questions.split(read, test)
        tokenizer = checkpoint.load_tokenizer(source, config) if source else self.tokenizer
        assert tokenizer is not None
        tokenizer.no_padding()
        tokenizer.no_truncation()
        training = parts.training[: settings.max_samples]
        if not any(question.answers for question in training):
            raise UserError("--data: expected questions for training that have an answer, but all are unanswerable")
        windows = [Windows(each, tokenizer, cut) for each in (training, parts.validation, parts.test)]
        return Asked(tokenizer, questions.digest([*read, *(test or ())]), *windows)

    def fit(self, settings: Settings, config: BERTConfig, data: Asked) -> tuple[Settings, BERTConfig]:
        """As many steps as the epochs take."""
        return self.timed(settings, len(data.training)), replace(config, labels=(), regression=False, dropout=0.0)

    def model(self, config: BERTConfig, ops: ModuleType) -> BERTForQuestionAnswering:
        """The checkpoint's encoder, under its own head if it has one for answers, else under a new one."""
        model = BERTForQuestionAnswering(config, ops)
        if "qa_outputs.weight" in self.weights:
            model.load_hugging_face(self.weights)
        elif self.weights:
            model.bert.load_hugging_face(encoder_weights(self.weights, model))
        return model

    def write_config(self, config: BERTConfig, data: Asked) -> dict[str, Any]:
        """As in `Program`."""
        return {
            **config.to_hugging_face(),
            "architectures": [self.architecture],
            UNANSWERABLE: data.unanswerable,
        }

    def describe(self, data: Asked, settings: Settings, config: BERTConfig) -> tuple[str, str]:
        """As in `Program`."""
        parts = (data.training, data.validation, data.test)
        sizes = " / ".join(f"{len(part.questions):,}" for part in parts)
        none = sum(not question.answers for part in parts for question in part.questions)
        mean = sum(data.training.lengths) / len(data.training)
        source = f"{len(settings.data or ())} files, {sizes} for training, validation and test, {none:,} unanswerable"
        windows = f"{len(data.training):,} sequences of {mean:.0f} tokens"
        return f"questions: {source}; {windows}", f"{settings.batch_size} sequences"

    def baselines(self, data: Asked, validation: Sequence[Batch]) -> dict[str, float]:
        """The validation loss where every token of a sequence is as likely as the others."""
        lengths = data.validation.lengths
        return {"every token alike": math.fsum(map(math.log, lengths)) / len(lengths)}

    def show(self, outcome: Outcome, found: Findings) -> None:
        """The test's exact match and F1 beside those of the baselines, and the answers that went most wrong."""
        data, test = outcome.data, outcome.data.test
        size = outcome.settings.batch_size
        answers = test.answers(outcome.model, size, outcome.precision, data.unanswerable)
        meant = [question.right for question in test.questions]
        nearby = NearbyWords(data.training.questions, data.validation.questions)
        said = {"words near the question's": [nearby(question) for question in test.questions]}
        said["the first words"] = [" ".join(question.context.split()[: nearby.length]) for question in test.questions]
        if data.unanswerable:
            said["no answer to any"] = [""] * len(meant)
        judged = {name: scores.of_answers(each, meant) for name, each in said.items()}
        ours = {"BERT": scores.of_answers([answer.text for answer in answers], meant)}
        found.scores(f"{len(meant):,} questions of the test", ours, judged)
        found.print(_worst(answers, test.questions))
        found.print(f'try it: torchweld answer --checkpoint {outcome.out} --context FILE "What does it say?"')


def _worst(answers: Sequence[Found], asked: Sequence[Question]) -> Table:
    """Wrong answers, those of the least F1 first; among equal ones those that the model was surest of."""
    rows = [(scores.best_overlap(a.text, q.right), -a.probability, a, q) for a, q in zip(answers, asked, strict=True)]
    wrong = sorted((row for row in rows if row[0] < 1), key=lambda row: row[:2])
    table = Table("question", "right", "answered", "probability", title="the most wrong")
    for _, _, answer, question in wrong[:WORST]:
        right = question.right[0] if question.answers else "-"
        table.add_row(question.text, right, answer.text or "-", f"{answer.probability:.3f}")
    return table
