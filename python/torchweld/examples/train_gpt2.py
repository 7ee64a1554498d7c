"""`torchweld train gpt2`: text, tokenizer, training, validation, checkpoint, curve and sample in one run."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console

from torchweld import backend
from torchweld.errors import UserError
from torchweld.examples import checkpoint, corpus, report
from torchweld.examples.generate import continuation
from torchweld.examples.machine import forced_backend, pick_device
from torchweld.examples.trainer import DTYPES, RECIPES, Recipe, Trainer
from torchweld.models.gpt2 import CONFIGS, GPT2Config

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended
VALIDATE_EVERY = 100
VALIDATION_TOKENS = 16384
SAMPLE_TOKENS = 160
# A text of its own needs no prompt of ours; in the standard library this one leads to code.
LIBRARY_PROMPT = "class Reader:\n"


@dataclass(frozen=True)
class Settings(Recipe):
    """All that a run is made from; what `training.json` keeps for --resume. `data`: files, or None for the library."""

    config: str
    seed: int
    data: list[str] | None

    @classmethod
    def new(cls, args: argparse.Namespace) -> Settings:
        """From the command line, with the config's own recipe for what it does not say."""
        name = args.config or "small"
        if name not in CONFIGS:
            raise UserError(f"--config: expected one of {', '.join(CONFIGS)}, but got {name!r}")
        recipe = asdict(RECIPES[name])
        return cls(**{**recipe, "config": name, "seed": 0, "data": None, **_given(args)})

    @classmethod
    def resumed(cls, args: argparse.Namespace, stored: dict[str, Any]) -> Settings:
        """Those of the stored run; what the command line says replaces them, except for the model."""
        try:
            settings = cls(**stored)
        except TypeError as error:
            raise UserError(f"training.json: expected the settings of a torchweld run, but got others: {error}") from None
        if args.config not in (None, settings.config):
            raise UserError(f"--config: expected {settings.config!r}, with which the run was started, but got "
                            f"{args.config!r}; leave it out with --resume")
        return replace(settings, **_given(args))


def _given(args: argparse.Namespace) -> dict[str, Any]:
    names = ("steps", "batch_size", "learning_rate", "seed", "data")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if "data" in given:
        given["data"] = [str(Path(path).absolute()) for path in given["data"]]
    return given


class Run:
    """One run of the command: what its parts share."""

    def __init__(self, args: argparse.Namespace, console: Console) -> None:
        self.console, self.compare = console, args.compare
        self.device, self.dtype = pick_device(args.device), args.dtype
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype: expected one of {', '.join(DTYPES)}, but got {self.dtype!r}")
        source = None
        if args.resume is None:
            self.out = Path(args.out)
            self.settings = Settings.new(args)
            self.model_config: GPT2Config = CONFIGS[self.settings.config]
        else:
            if args.compare:
                raise UserError("--compare: expected a fresh run, in which both sides start from the same weights, but got "
                                "--resume; leave one of the two out")
            source = checkpoint.locate(Path(args.resume or args.out))
            self.out = source.parent
            self.model_config, weights, tokenizer = checkpoint.load_model(source)
            training, moments = checkpoint.load_training(source)
            self.settings = Settings.resumed(args, training["settings"])
        if source is None and not args.overwrite and (found := checkpoint.checkpoints(self.out)):
            raise UserError(f"--out {self.out}: expected a directory without a run, but it has {found[-1].name}; continue "
                            f"it with --resume, replace it with --overwrite, or choose another with --out DIR")

        documents = corpus.read_files(self.settings.data) if self.settings.data else corpus.standard_library()
        self.text = corpus.load_corpus(documents, self.model_config.vocab_size, tokenizer if source else None)
        self._check_text()
        console.print(f"text: {len(documents)} {'files' if self.settings.data else 'documents of the standard library'}, "
                      f"{len(self.text.train):,} tokens for training, {len(self.text.validation):,} for validation")
        self.validation = self.text.validation_batches(
            self.settings.batch_size, self.model_config.n_positions, VALIDATION_TOKENS
        )
        self.unigram = corpus.unigram_entropy(self.validation)

        torch.manual_seed(self.settings.seed)
        ours = Trainer(self.model_config, self.settings, self.device, self.dtype)
        self.trainers = [ours]
        if source is not None:
            if training["digest"] != self.text.digest:
                raise UserError(f"--resume {source}: expected the text that the run was started with, but it has changed; "
                                f"give the same files with --data, or start a new run with --out DIR")
            ours.model.load_hugging_face(weights)
            checkpoint.restore_optimizer(ours.model, ours.optimizer, moments)
            ours.losses = training["losses"]
            ours.validation = [(step, loss) for step, loss in training["validation"]]
            console.print(f"resuming {source} after step {ours.step} of {self.settings.steps}")
        if self.compare:
            theirs = Trainer(self.model_config, self.settings, self.device, self.dtype, on_stock=True)
            theirs.model.load_state_dict(ours.model.state_dict())
            self.trainers.append(theirs)
        checkpoint.prepare_output(self.out)
        if args.overwrite:
            checkpoint.remove(self.out)

    def _check_text(self) -> None:
        need = self.model_config.n_positions + 2
        for name, tokens in (("training", self.text.train), ("validation", self.text.validation)):
            if len(tokens) < need:
                raise UserError(f"training text: expected at least {need} tokens for {name} with config "
                                f"{self.settings.config!r}, but got {len(tokens)}; give more text with --data, or a smaller "
                                f"--config")

    def train(self) -> bool:
        """Steps until the last one or Ctrl-C, validating and saving on the way; whether the last one was reached."""
        settings, ours = self.settings, self.trainers[0]
        shape = settings.batch_size, self.model_config.n_positions
        done = ours.step
        with (
            deferred_interrupt() as interrupted,
            report.Reporter(self.console, done, settings.steps) as reporter,
        ):
            while done < settings.steps and not interrupted():
                batch = self.text.batch(*shape, settings.seed, done)
                # With --compare each side goes first as often as the other.
                for trainer in self.trainers if done % 2 == 0 else reversed(self.trainers):
                    trainer.advance(*batch)
                done = ours.step
                reporter.step(self.trainers, shape[0] * shape[1])
                if done == settings.steps or done % VALIDATE_EVERY == 0:
                    for trainer in self.trainers:
                        trainer.validate(self.validation)
                    reporter.validation(self.trainers)
                    self.save()
            if done < settings.steps:
                self.save()
        return done >= settings.steps

    def save(self) -> Path:
        """Of torchweld's side: the directory."""
        ours = self.trainers[0]
        training = {
            "settings": asdict(self.settings),
            "digest": self.text.digest,
            "losses": ours.losses,
            "validation": ours.validation,
        }
        moments = checkpoint.optimizer_tensors(ours.model, ours.optimizer)
        return checkpoint.save(self.out, ours.step, ours.model, self.text.tokenizer, moments, training)

    def finish(self) -> int:
        """The results: validation, comparison, curve and sample."""
        ours, console = self.trainers[0], self.console
        loss = ours.validation[-1][1]
        console.print(f"validation loss {loss:.3f} nats per token (perplexity {report.perplexity(loss)}), "
                      f"unigram entropy {self.unigram:.3f} (perplexity {report.perplexity(self.unigram)}): "
                      f"{self.unigram - loss:.3f} {'below' if loss < self.unigram else 'NOT below'} it")
        agree = True
        if self.compare:
            tokens = self.settings.batch_size * self.model_config.n_positions
            agree = report.compare(console, *self.trainers, tokens, self.dtype)
        console.print(f"checkpoint: {self.save()}")
        curve = self.out / "loss.png"
        drawn = report.plot(curve, self.trainers, self.unigram)
        console.print(f"loss curve: {curve if drawn else 'not drawn, matplotlib is missing: pip install torchweld[plot]'}")
        ours.model.eval()
        prompt = "" if self.settings.data else LIBRARY_PROMPT
        sample = continuation(
            ours.model, self.text.tokenizer, prompt, SAMPLE_TOKENS, temperature=0.7, top_k=50, seed=self.settings.seed
        )
        console.rule("sample")
        console.print(prompt + "".join(sample))
        console.rule()
        return 0 if agree else 1


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Within it Ctrl-C only makes the yielded function return True; a second one ends the program as usual."""
    seen = False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        seen = True
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: seen
    finally:
        signal.signal(signal.SIGINT, previous)


def run(args: argparse.Namespace) -> int:
    """`torchweld train gpt2`. Returns 0, 1 if --compare found curves that differ, or 130 after Ctrl-C."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    device = pick_device(args.device)
    try:
        with forced_backend(args.backend, device):
            job = Run(args, console)
            parameters = sum(p.numel() for p in job.trainers[0].model.parameters())
            console.print(f"model: {job.settings.config}, {parameters / 1e6:.1f} M parameters, context "
                          f"{job.model_config.n_positions}; on {device} (kernels: {backend.active(device)}), {job.dtype}, "
                          f"{job.settings.steps} steps of {job.settings.batch_size} sequences")
            if job.train():
                return job.finish()
            console.print(f"interrupted after step {job.trainers[0].step} of {job.settings.steps}: saved in {job.save()}; "
                          f"continue with: torchweld train gpt2 --resume {job.out}")
    except torch.OutOfMemoryError:
        raise UserError(f"--device {device}: expected a batch that fits into its memory, but it does not; lower "
                        f"--batch-size, or choose a smaller --config") from None
    except KeyboardInterrupt:
        console.print("interrupted; nothing was saved beyond the last checkpoint, if there is one")
    return INTERRUPTED
