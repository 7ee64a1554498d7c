"""`torchweld train gpt2`: text, tokenizer, training, validation, checkpoint, curve and sample in one run."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from torchweld import backend
from torchweld.errors import UserError
from torchweld.memory import KeptMemory, keep_memory
from torchweld.models.gpt2 import CONFIGS, GPT2Config
from torchweld.training import checkpoint, corpus, report
from torchweld.training.apart import ApartTrainer
from torchweld.training.generate import continuation
from torchweld.training.machine import deferred_interrupt, forced_backend, pick_device
from torchweld.training.processes import Processes, joined
from torchweld.training.settings import Settings
from torchweld.training.trainer import DTYPES, RIVALS, Trainer

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended
DEFAULT_OUT = "torchweld-gpt2"
DEFAULT_MALLOC = "torch, default malloc"
VALIDATE_EVERY = 100
VALIDATION_TOKENS = 16384
SAMPLE_TOKENS = 160
LIBRARY_PROMPT = "class Reader:\n"


@dataclass
class Job:
    """A run that is ready to go. `trainers`: ours, then with --compare its rivals. `validation`: batches."""

    out: Path
    settings: Settings
    text: corpus.Corpus
    validation: list[tuple[Tensor, Tensor]]
    trainers: list[Trainer]
    processes: Processes

    @property
    def step_shape(self) -> tuple[int, int]:
        """Sequences, and tokens in each."""
        return self.settings.batch_size, self.trainers[0].model.config.n_positions

    def save(self) -> Path:
        """Writes a checkpoint of our trainer, which is the same in all processes; returns its directory."""
        ours = self.trainers[0]
        training = {
            "settings": asdict(self.settings),
            "digest": self.text.digest,
            "losses": ours.losses,
            "validation": ours.validation,
        }
        moments = checkpoint.optimizer_tensors(ours.model, ours.optimizer)
        return checkpoint.save(self.out, ours.step, ours.model, self.text.tokenizer, moments, training)


def start(args: argparse.Namespace, processes: Processes, kept: KeptMemory | None) -> Job:
    """A fresh run in an output directory of its own. `kept`: what malloc keeps in this process, if it was asked to."""
    settings, out = Settings.fresh(args, processes.count), Path(args.out)
    if not args.overwrite and (found := checkpoint.checkpoints(out)):
        raise UserError(
            f"--out {out}: expected a directory without a run, but it has {found[-1].name}; "
            f"continue that with --resume, replace it with --overwrite, or choose another directory"
        )
    config = CONFIGS[settings.config]
    with processes.one_after_another():
        text = corpus.load_corpus(_documents(settings), config.vocab_size)
    validation = _validation(text, settings, config)
    torch.manual_seed(settings.seed)
    trainers = [Trainer(config, settings, processes, args.dtype)]
    for name in _rivals(args):
        trainers.append(Trainer(config, settings, processes, args.dtype, name))
        trainers[-1].model.load_state_dict(trainers[0].model.state_dict())
        if name == "torch" and kept is not None and kept.kept and processes.count == 1:
            trainers.append(ApartTrainer(config, settings, args.dtype, name, DEFAULT_MALLOC))
    if processes.first:
        checkpoint.prepare_output(out)
        if args.overwrite:
            checkpoint.remove(out)
    return Job(out, settings, text, validation, trainers, processes)


def _rivals(args: argparse.Namespace) -> list[str]:
    """What --compare names; without a name all that there are."""
    if args.compare is None:
        return []
    if unknown := sorted(set(args.compare) - set(RIVALS)):
        raise UserError(f"--compare: expected names out of {', '.join(RIVALS)}, but got {unknown[0]!r}")
    return [name for name in RIVALS if not args.compare or name in args.compare]


def resume(args: argparse.Namespace, processes: Processes, kept: KeptMemory | None) -> Job:
    """The run of a checkpoint, at the step where it was saved."""
    if args.compare is not None:
        raise UserError(
            "--compare: expected a fresh run, whose two sides start from the same weights, but got --resume"
        )
    if args.overwrite:
        raise UserError("--overwrite: expected a fresh run, which replaces the one in --out, but got --resume")
    if args.resume and args.out not in (DEFAULT_OUT, args.resume):
        raise UserError(
            f"--out: expected none beside --resume {args.resume}, whose run goes on where it is, but got {args.out!r}; "
            f"copy {args.resume} and resume the copy"
        )
    source = checkpoint.locate(Path(args.resume or args.out))
    config, weights, tokenizer = checkpoint.load_model(source)
    training, moments = checkpoint.load_training(source)
    settings = Settings.resumed(args, training["settings"], training["step"], processes.count)
    with processes.one_after_another():
        text = corpus.load_corpus(_documents(settings), config.vocab_size, tokenizer)
    if training["digest"] != text.digest:
        raise UserError(
            f"--resume {source}: expected the text that the run was started with, but it has changed; "
            f"give the same files with --data, or start a new run with --out DIR"
        )
    trainer = Trainer(config, settings, processes, args.dtype)
    trainer.model.load_hugging_face(weights)
    checkpoint.restore_optimizer(trainer.model, trainer.optimizer, moments)
    trainer.losses = training["losses"]
    trainer.validation = [(step, loss) for step, loss in training["validation"]]
    if processes.first:
        checkpoint.prepare_output(source.parent)
    return Job(source.parent, settings, text, _validation(text, settings, config), [trainer], processes)


def _documents(settings: Settings) -> list[str]:
    return corpus.read_files(settings.data) if settings.data else corpus.standard_library()


def _validation(text: corpus.Corpus, settings: Settings, config: GPT2Config) -> list[tuple[Tensor, Tensor]]:
    need = config.n_positions + 2
    for part, tokens in (("training", text.train), ("validation", text.validation)):
        if len(tokens) < need:
            raise UserError(
                f"text: expected at least {need} tokens for {part} with a context of {config.n_positions}, but got "
                f"{len(tokens)} (validation takes a tenth); give more text with --data, or a smaller --config"
            )
    return text.validation_batches(settings.batch_size, config.n_positions, VALIDATION_TOKENS)


def train(job: Job, console: Console) -> bool:
    """Runs the steps, validating and saving on the way; False if Ctrl-C ended it before the last one."""
    ours, steps, processes = job.trainers[0], job.settings.steps, job.processes
    patient = processes.count > 1
    with deferred_interrupt(patient) as interrupted, report.Reporter(console, ours.step, steps) as reporter:
        while ours.step < steps:
            batch = job.text.batch(*job.step_shape, job.settings.seed, ours.step)
            # With --compare each side goes first as often as the others.
            first = ours.step % len(job.trainers)
            for trainer in job.trainers[first:] + job.trainers[:first]:
                trainer.advance(*batch)
            reporter.step(job.trainers, job.step_shape[0] * job.step_shape[1])
            if ours.step == steps or ours.step % VALIDATE_EVERY == 0:
                for trainer in job.trainers:
                    trainer.validate(job.validation)
                reporter.validation(job.trainers)
                if processes.first:
                    job.save()
            if processes.any(interrupted()) and ours.step < steps:
                if processes.first:
                    job.save()
                return False
    return True


def finish(job: Job, console: Console) -> None:
    """Shows what came out: validation, checkpoint, loss curve and sample."""
    ours = job.trainers[0]
    unigram = corpus.unigram_entropy(job.validation)
    loss = ours.validation[-1][1]
    console.print(
        f"validation loss {loss:.3f} nats per token (perplexity {report.perplexity(loss)}); unigram entropy of the "
        f"same tokens {unigram:.3f} (perplexity {report.perplexity(unigram)})"
    )
    console.print(f"checkpoint: {job.save()}")
    curve = job.out / "loss.png"
    drawn = report.plot(curve, job.trainers, unigram)
    console.print(f"loss curve: {curve if drawn else 'not drawn, matplotlib is missing: pip install torchweld[plot]'}")
    ours.model.eval()
    prompt = "" if job.settings.data else LIBRARY_PROMPT
    sample = continuation(
        ours.model, job.text.tokenizer, prompt, SAMPLE_TOKENS, temperature=0.7, top_k=50, seed=job.settings.seed
    )
    console.rule("sample")
    console.print(prompt + "".join(sample))
    console.rule()


def run(args: argparse.Namespace) -> int:
    """Returns 0, 1 if --compare found loss curves that differ, or 130 after Ctrl-C."""
    began = time.perf_counter()
    device = pick_device(args.device)
    if args.dtype not in DTYPES:
        raise UserError(f"--dtype: expected one of {', '.join(DTYPES)}, but got {args.dtype!r}")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    processes = Processes()
    try:
        with forced_backend(args.backend, device), joined(device) as processes:
            console.quiet = not processes.first
            on_cpu = torch.device(device).type == "cpu"
            kept = keep_memory() if args.keep_memory and on_cpu else None
            job = (start if args.resume is None else resume)(args, processes, kept)
            _introduce(job, device, args.dtype, console)
            if kept is not None:
                console.print(f"memory: {kept}")
            complete = train(job, console)
            agree = True
            if len(job.trainers) > 1:
                agree = report.compare(console, job.trainers, job.step_shape[0] * job.step_shape[1])
            if complete:
                if processes.first:
                    finish(job, console)
                console.print(f"done in {time.perf_counter() - began:.0f} s")
                return 0 if agree else 1
            console.print(
                f"interrupted after step {job.trainers[0].step} of {job.settings.steps}, which is saved; "
                f"continue with: torchweld train gpt2 --resume {job.out}"
            )
    except torch.OutOfMemoryError:
        raise UserError(
            f"--device {device}: expected a batch that fits into its memory, but it does not; lower --batch-size, or "
            f"choose a smaller --config"
        ) from None
    except UserError:
        if processes.first:
            raise
        return 2  # all have the same input, and the first one says what is wrong with it
    except KeyboardInterrupt:
        console.print("interrupted; nothing is saved beyond the last checkpoint")
    return INTERRUPTED


def _introduce(job: Job, device: str, dtype: str, console: Console) -> None:
    source = f"{len(job.settings.data)} files" if job.settings.data else "the Python standard library"
    console.print(
        f"text: {source}, {len(job.text.train):,} tokens for training, {len(job.text.validation):,} for validation"
    )
    model, (sequences, context) = job.trainers[0].model, job.step_shape
    console.print(
        f"model: {job.settings.config}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; "
        f"{job.settings.steps} steps of {sequences} x {context} tokens"
    )
    threads = f", {torch.get_num_threads()} thread(s)" if torch.device(device).type == "cpu" else ""
    together = f"{job.processes.count} processes, each on " if job.processes.count > 1 else ""
    console.print(f"device: {together}{device}{threads}, {dtype}, kernels of the {backend.active(device)} backend")
    if job.trainers[0].step:
        console.print(f"resuming after step {job.trainers[0].step}")
