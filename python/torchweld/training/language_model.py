"""`torchweld train gpt2` and `gpt3`: text, tokenizer, the next token's loss, and a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from torchweld.errors import UserError
from torchweld.models import gpt2, gpt3
from torchweld.training import checkpoint, corpus, report
from torchweld.training.findings import Findings
from torchweld.training.generate import continuation
from torchweld.training.program import Batch, Outcome
from torchweld.training.settings import Recipe, Settings

VALIDATION_TOKENS = 16384
SAMPLE_TOKENS = 160
LIBRARY_PROMPT = "class Reader:\n"


@dataclass(frozen=True)
class LanguageModel:
    """A program whose model says which token comes next."""

    name: str
    title: str
    configs: Mapping[str, gpt2.GPT2Config]
    recipes: Mapping[str, Recipe]
    kind: type[gpt2.GPT2]
    config_kind: type[gpt2.GPT2Config]
    input: str = "text"
    unit: str = "nats per token"
    counted: str = "tokens"
    splits: bool = True  # its sequences can be spread over processes
    options: Mapping[str, str | None] = field(default_factory=dict)
    defaults: Mapping[str, str] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """On the command line."""
        return f"train {self.name}"

    def data(self, settings: Settings, config: gpt2.GPT2Config, source: Path | None = None) -> corpus.Corpus:
        """The text, split; as in `Program`."""
        documents = corpus.read_files(settings.data) if settings.data else corpus.standard_library()
        tokenizer = checkpoint.load_tokenizer(source, config) if source else None
        text = corpus.load_corpus(documents, config.vocab_size, tokenizer)
        need = config.n_positions + 2
        for part, tokens in (("training", text.train), ("validation", text.validation)):
            if len(tokens) < need:
                raise UserError(
                    f"text: expected at least {need} tokens for {part} with a context of {config.n_positions}, but got "
                    f"{len(tokens)} (validation takes a tenth); give more text with --data, or a smaller --config"
                )
        if settings.max_samples is None:
            return text
        return replace(text, train=text.train[: settings.max_samples * config.n_positions + 1])  # + the last target

    def fit(self, settings: Settings, config: gpt2.GPT2Config, data: corpus.Corpus) -> tuple[Settings, gpt2.GPT2Config]:
        """As in `Program`: nothing does."""
        return settings, config

    def model(self, config: gpt2.GPT2Config, ops: ModuleType) -> gpt2.GPT2:
        """As in `Program`."""
        return self.kind(config, ops)

    def batches(
        self, data: corpus.Corpus, settings: Settings, config: gpt2.GPT2Config, step: int, parts: int
    ) -> list[Batch]:
        """Windows of the training text, drawn anew for each step."""
        inputs, targets = data.batch(settings.batch_size, config.n_positions, settings.seed, step)
        return [_batch(x, y) for x, y in zip(inputs.chunk(parts), targets.chunk(parts), strict=True)]

    def validation(self, data: corpus.Corpus, settings: Settings, config: gpt2.GPT2Config) -> list[Batch]:
        """Windows spread over the validation text."""
        size = settings.batch_size // settings.accumulate
        return [_batch(x, y) for x, y in data.validation_batches(size, config.n_positions, VALIDATION_TOKENS)]

    def losses(self, model: gpt2.GPT2, *tensors: Tensor) -> dict[str, Tensor]:
        """The mean cross-entropy of the targets, in nats."""
        inputs, targets, *positions = tensors  # the last where the sequences are spread over processes
        return {"loss": model.loss(inputs, targets, *positions)}

    def read_config(self, values: dict[str, Any]) -> gpt2.GPT2Config:
        """As in `Program`."""
        return self.config_kind.from_hugging_face(values)

    def write_config(self, config: gpt2.GPT2Config, data: corpus.Corpus) -> dict[str, Any]:
        """As in `Program`."""
        end = corpus.end_of_text(data.tokenizer)
        return {**config.to_hugging_face(), "bos_token_id": end, "eos_token_id": end}

    def describe(self, data: corpus.Corpus, settings: Settings, config: gpt2.GPT2Config) -> tuple[str, str]:
        """As in `Program`."""
        source = f"{len(settings.data)} files" if settings.data else "the Python standard library"
        sizes = f"{len(data.train):,} tokens for training, {len(data.validation):,} for validation"
        return f"text: {source}, {sizes}", f"{settings.batch_size} x {config.n_positions} tokens"

    def baselines(self, data: corpus.Corpus, validation: Sequence[Batch]) -> dict[str, float]:
        """The entropy of the validation tokens' own frequencies: what is possible without their context."""
        pairs = [(batch.tensors[0], batch.tensors[1]) for batch in validation]
        return {"unigram entropy of the validation tokens": corpus.unigram_entropy(pairs)}

    def show(self, outcome: Outcome, found: Findings) -> None:
        """Perplexity, and a sample."""
        loss, (unigram,) = outcome.loss, outcome.baselines.values()
        found.print(
            f"validation loss {loss:.3f} nats per token (perplexity {report.perplexity(loss)}); unigram entropy of the "
            f"same tokens {unigram:.3f} (perplexity {report.perplexity(unigram)})"
        )
        prompt = "" if outcome.settings.data else LIBRARY_PROMPT
        sampling = {"temperature": 0.7, "top_k": 50, "seed": outcome.settings.seed}
        sample = continuation(outcome.model, outcome.data.tokenizer, prompt, SAMPLE_TOKENS, **sampling)
        found.sample("sample", prompt + "".join(sample))


def _batch(inputs: Tensor, targets: Tensor) -> Batch:
    return Batch((inputs, targets), {"loss": targets.numel()}, targets.numel())


# "small" is made for two CPU cores and three minutes, "medium" for fifteen; the published sizes want a GPU. Their rates
# follow Brown et al., arXiv:2005.14165, table 2.1.
_GPT2_RECIPES = {
    "tiny": Recipe(steps=200, batch_size=8, learning_rate=3e-3),
    "small": Recipe(steps=900, batch_size=4, learning_rate=3e-3),
    "medium": Recipe(steps=600, batch_size=4, learning_rate=1.5e-3),
    "gpt2": Recipe(steps=2000, batch_size=16, learning_rate=6e-4),
    "gpt2-medium": Recipe(steps=2000, batch_size=16, learning_rate=3e-4),
    "gpt2-large": Recipe(steps=2000, batch_size=8, learning_rate=2.5e-4),
    "gpt2-xl": Recipe(steps=2000, batch_size=8, learning_rate=2e-4),
}
_GPT3_RECIPES = {
    "tiny": _GPT2_RECIPES["tiny"],
    "small": _GPT2_RECIPES["small"],
    "long": Recipe(steps=400, batch_size=1, learning_rate=3e-3),
    "gpt3-small": Recipe(steps=2000, batch_size=16, learning_rate=6e-4, accumulate=2),
    "gpt3-medium": Recipe(steps=2000, batch_size=16, learning_rate=3e-4, accumulate=4),
    "gpt3-large": Recipe(steps=2000, batch_size=16, learning_rate=2.5e-4, accumulate=8),
    "gpt3-xl": Recipe(steps=2000, batch_size=16, learning_rate=2e-4, accumulate=8),
    "gpt3-2.7b": Recipe(steps=2000, batch_size=16, learning_rate=1.6e-4, accumulate=16),
    "gpt3-6.7b": Recipe(steps=2000, batch_size=16, learning_rate=1.2e-4, accumulate=16),
    "gpt3-13b": Recipe(steps=2000, batch_size=16, learning_rate=1e-4, accumulate=16),
    "gpt3-175b": Recipe(steps=2000, batch_size=16, learning_rate=0.6e-4, accumulate=16),
}

GPT2 = LanguageModel("gpt2", "GPT-2", gpt2.CONFIGS, _GPT2_RECIPES, gpt2.GPT2, gpt2.GPT2Config)
GPT3 = LanguageModel("gpt3", "GPT-3", gpt3.CONFIGS, _GPT3_RECIPES, gpt3.GPT3, gpt3.GPT3Config)
