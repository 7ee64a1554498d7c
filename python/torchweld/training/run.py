"""A training run: data, steps, validation, checkpoints, comparison, and what came out; of any program."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from rich.console import Console

from torchweld import backend
from torchweld.errors import UserError
from torchweld.memory import KeptMemory, keep_memory
from torchweld.training import checkpoint, optimizer_state, optimizers, page, report, shards
from torchweld.training.apart import ApartTrainer
from torchweld.training.findings import Findings
from torchweld.training.job import Job
from torchweld.training.machine import deferred_interrupt, forced_backend, pick_device
from torchweld.training.processes import Processes, joined
from torchweld.training.program import Outcome, Program
from torchweld.training.settings import Settings
from torchweld.training.sharing import check_sharing
from torchweld.training.trainer import DTYPES, RIVALS, Trainer

FORMATS = ("safetensors", "distributed")
INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended
DEFAULT_MALLOC = "torch, default malloc"


def start(args: argparse.Namespace, program: Program, processes: Processes, kept: KeptMemory | None) -> Job:
    """A fresh run in an output directory of its own. `kept`: what malloc keeps in this process, if it was asked to."""
    settings = Settings.fresh(args, program, processes.replicas)
    optimizers.choice(settings.optimizer)
    out = Path(args.out or default_out(program))
    if not args.overwrite and (found := checkpoint.checkpoints(out)):
        raise UserError(
            f"--out {out}: expected a directory without a run, but it has {found[-1].name}; "
            f"continue that with --resume, replace it with --overwrite, or choose another directory"
        )
    config = program.configs[settings.config]
    with processes.one_after_another():
        data = program.data(settings, config)
    settings, config = program.fit(settings, config, data)
    validation = program.validation(data, settings, config)
    torch.manual_seed(settings.seed)
    trainers = [Trainer(program, config, settings, processes, args.dtype)]
    for name in _rivals(args):
        trainers.append(Trainer(program, config, settings, processes, args.dtype, name))
        trainers[-1].model.load_state_dict(trainers[0].model.state_dict())
        if name == "torch" and kept is not None and kept.kept and processes.count == 1:
            trainers.append(ApartTrainer(program, config, settings, args.dtype, name, DEFAULT_MALLOC))
    if processes.first:
        checkpoint.prepare_output(out)
        if args.overwrite:
            checkpoint.remove(out)
    return Job(program, out, settings, data, validation, trainers, processes, _distributed(args))


def _distributed(args: argparse.Namespace, otherwise: bool = False) -> bool:
    """Whether --checkpoint-format says so, or `otherwise` where it says nothing."""
    kind = args.checkpoint_format
    if kind not in (None, *FORMATS):
        raise UserError(f"--checkpoint-format: expected one of {', '.join(FORMATS)}, but got {kind!r}")
    return otherwise if kind is None else kind == "distributed"


def default_out(program: Program) -> str:
    """Where a run goes that names no place."""
    return f"torchweld-{program.name}"


def _rivals(args: argparse.Namespace) -> list[str]:
    """What --compare names; without a name all that there are."""
    if args.compare is None:
        return []
    if unknown := sorted(set(args.compare) - set(RIVALS)):
        raise UserError(f"--compare: expected names out of {', '.join(RIVALS)}, but got {unknown[0]!r}")
    return [name for name in RIVALS if not args.compare or name in args.compare]


def resume(args: argparse.Namespace, program: Program, processes: Processes, kept: KeptMemory | None) -> Job:
    """The run of a checkpoint, at the step where it was saved."""
    if args.compare is not None:
        raise UserError(
            "--compare: expected a fresh run, whose two sides start from the same weights, but got --resume"
        )
    if args.overwrite:
        raise UserError("--overwrite: expected a fresh run, which replaces the one in --out, but got --resume")
    if args.resume and args.out not in (None, args.resume):
        raise UserError(
            f"--out: expected none beside --resume {args.resume}, whose run goes on where it is, but got {args.out!r}; "
            f"copy {args.resume} and resume the copy"
        )
    source = checkpoint.locate(Path(args.resume or args.out or default_out(program)))
    training, in_parts = checkpoint.load_training(source), checkpoint.in_parts(source)
    distributed = _distributed(args, in_parts)
    stored, step = training["settings"], training["step"]
    settings = Settings.resumed(args, program, stored, step, processes.replicas)
    config = checkpoint.load_config(source, program.read_config)
    if not in_parts:
        weights, state = checkpoint.load_model(source, program.read_config)[1], checkpoint.load_optimizer(source)
    with processes.one_after_another():
        data = program.data(settings, config, source)
    if training["digest"] != data.digest:
        raise UserError(
            f"--resume {source}: expected the {program.input} that the run was started with, but it has changed; "
            f"give the same files with --data, or start a new run with --out DIR"
        )
    trainer = Trainer(program, config, settings, processes, args.dtype)
    shared, model = trainer.sharing, trainer.model
    if in_parts:
        shards.load_model(source, model, shared)
        shards.load_optimizer(source, model, shared, trainer.optimizer, settings.optimizer)
    else:
        shared.load(model, weights)
        optimizer_state.restore(
            model, trainer.optimizer, settings.optimizer, state, lambda name, t: shared.own_state(model, name, t)
        )
    trainer.losses = training["losses"]
    trainer.validation = [(step, loss) for step, loss in training["validation"]]
    if processes.first:
        checkpoint.prepare_output(source.parent)
    validation = program.validation(data, settings, config)
    return Job(program, source.parent, settings, data, validation, [trainer], processes, distributed)


def train(job: Job, console: Console) -> bool:
    """Runs the steps, validating and saving on the way; False if Ctrl-C ended it before the last one."""
    ours, settings, processes = job.trainers[0], job.settings, job.processes
    steps, patient = settings.steps, processes.count > 1
    reporting = report.Reporter(console, ours.step, steps, job.program)
    with deferred_interrupt(patient) as interrupted, reporting as reporter:
        while ours.step < steps:
            batches = job.batches(ours.step)
            # With --compare each side goes first as often as the others.
            first = ours.step % len(job.trainers)
            for trainer in job.trainers[first:] + job.trainers[:first]:
                trainer.advance(batches)
            reporter.step(job.trainers)
            if ours.step == steps or ours.step % settings.validate_every == 0:
                for trainer in job.trainers:
                    trainer.validate(job.validation)
                reporter.validation(job.trainers)
                if settings.keep_best:
                    job.save_best()
                job.save()
            if processes.any(interrupted()) and ours.step < steps:
                job.save()
                return False
    return True


def finish(job: Job, found: Findings) -> None:
    """Shows what came out: checkpoint, loss curve, what the program has to say, and the page with all of it.

    All processes call it, for a shared model is gathered by all; the first one shows.
    """
    ours, saved = job.trainers[0], job.save()
    apart = job.distributed and ours.sharing.gathers
    model = None if apart else ours.sharing.whole(ours.model)
    if not job.processes.first:
        return
    baselines = job.program.baselines(job.data, job.validation)
    console = found.console
    console.print(f"checkpoint: {saved}")
    loss = ours.validation[-1][1]
    if job.settings.keep_best and (best := checkpoint.best(job.out)) is not None:
        loss = min(loss for _, loss in ours.validation)
        if model is not None and checkpoint.in_parts(best):
            shards.load_model(best, model, ours.sharing, alone=True)
        elif model is not None:
            model.load_hugging_face(checkpoint.load_model(best, job.program.read_config)[1])
        console.print(f"best validation: {best}, loss {loss:.4f}")
    curve = job.out / "loss.png"
    drawn = report.plot(curve, job.program, job.trainers, baselines)
    console.print(f"loss curve: {curve if drawn else 'not drawn, matplotlib is missing: pip install torchweld[plot]'}")
    if model is None:
        console.print(
            f"its weights are in parts, and no process has all of them; gather them: torchweld gather {job.out}"
        )
    else:
        model.eval()
        result = loss, baselines, ours.precision()
        job.program.show(Outcome(job.out, model, job.data, job.settings, job.validation, *result), found)
    whole = page.write(job.out / "report.html", job.program, job.settings, job.trainers, baselines, loss, found)
    console.print(f"all of it in a page: {whole}")


def run(args: argparse.Namespace, program: Program) -> int:
    """The whole of it. Returns 0, 1 if --compare found loss curves that differ, or 130 after Ctrl-C."""
    began = time.perf_counter()
    device = pick_device(args.device)
    if args.dtype not in DTYPES:
        raise UserError(f"--dtype: expected one of {', '.join(DTYPES)}, but got {args.dtype!r}")
    parallel = getattr(args, "parallel", None) or "data"
    check_sharing(parallel, program, args.compare)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    processes = Processes()
    try:
        with forced_backend(args.backend, device), joined(device, parallel) as processes:
            console.quiet = not processes.first
            on_cpu = torch.device(device).type == "cpu"
            kept = keep_memory() if args.keep_memory and on_cpu else None
            job = (start if args.resume is None else resume)(args, program, processes, kept)
            found = Findings(console, job.out)
            _introduce(job, device, args.dtype, found)
            if kept is not None:
                found.introduce("memory", str(kept))
            complete = train(job, console)
            agree = True
            if len(job.trainers) > 1:
                agree = report.compare(found, job.trainers)
            if complete:
                finish(job, found)
                console.print(f"done in {time.perf_counter() - began:.0f} s")
                return 0 if agree else 1
            console.print(
                f"interrupted after step {job.trainers[0].step} of {job.settings.steps}, which is saved; "
                f"continue with: torchweld {program.command} --resume {job.out}"
            )
    except torch.OutOfMemoryError:
        raise UserError(
            f"--device {device}: expected a batch that fits into its memory, but it does not; raise "
            f"--accumulate, lower --batch-size, or choose a smaller --config"
        ) from None
    except UserError:
        if processes.first:
            raise
        return 2  # all have the same input, and the first one says what is wrong with it
    except KeyboardInterrupt:
        console.print("interrupted; nothing is saved beyond the last checkpoint")
    return INTERRUPTED


def _introduce(job: Job, device: str, dtype: str, found: Findings) -> None:
    data, each = job.program.describe(job.data, job.settings, job.config)
    model, settings = job.trainers[0].model, job.settings
    parameters = sum(p.numel() for p in model.parameters())
    parts = f" in {settings.accumulate} parts" if settings.accumulate > 1 else ""
    for line in data.splitlines():
        name, _, text = line.partition(": ")
        found.introduce(name, text)
    if settings.max_samples is not None:
        found.introduce("samples", f"of those for training the first {settings.max_samples:,} at most (--max-samples)")
    found.introduce(
        "model",
        f"{settings.config}, {parameters / 1e6:.1f} M parameters; {settings.steps} steps of {each}{parts}, "
        f"{settings.optimizer}",
    )
    threads = f", {torch.get_num_threads()} thread(s)" if torch.device(device).type == "cpu" else ""
    kind = "" if job.processes.parallel == "data" else f" ({job.processes.parallel} parallel)"
    together = f"{job.processes.count} processes{kind}, each on " if job.processes.count > 1 else ""
    found.introduce("device", f"{together}{device}{threads}, {dtype}, kernels of the {backend.active(device)} backend")
    if job.trainers[0].step:
        found.console.print(f"resuming after step {job.trainers[0].step}")
