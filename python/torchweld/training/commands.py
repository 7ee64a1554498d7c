"""The options of `torchweld train`, `fine-tune`, `generate`, `classify`, and `fill-mask`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchweld.errors import UserError
from torchweld.training import checkpoint, classify, fill_mask, generate, hub, run
from torchweld.training.answering import Answering
from torchweld.training.arguments import add_machine_options, add_window_options, number, whole
from torchweld.training.fine_tune import FineTune
from torchweld.training.optimizers import OPTIMIZERS
from torchweld.training.programs import PROGRAMS
from torchweld.training.settings import Choices
from torchweld.training.tagged import LAST
from torchweld.training.tagging import Tagging
from torchweld.training.tuning import Tuning

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


TASKS: dict[str, type[Tuning]] = {"classify": FineTune, "regress": FineTune, "answer": Answering, "tag": Tagging}
OPTIONS = ("source_language", "target_language", "likelihood", "shift", "flip")
TASK_OPTIONS = ("text", "label", "test", "window", "stride")
_EXIT = (
    "Ctrl-C saves a checkpoint after the step it falls in and ends with exit code 130; a second one ends at once. "
    "Other exit codes: 0 done, 1 --compare found loss curves that differ, 2 bad input."
)


def add_train_parser(subparsers: Subparsers) -> None:
    """Adds `torchweld train NAME`; its `func` takes the parsed arguments and returns the exit code."""
    parser = subparsers.add_parser(
        "train",
        help="train a model on text, images or speech, here and now",
        description="Trains a model with torchweld's kernels, validates it, saves a checkpoint and shows a sample. "
        "Without --data it learns the text of Python's standard library, which is on every machine; what "
        "other programs learn `torchweld data get` brings. Several processes "
        "share each batch: torchrun --nproc-per-node 2 -m torchweld train gpt2.",
        epilog=_EXIT,
    )
    parser.add_argument("name", metavar="NAME", help=f"what to train: {', '.join(PROGRAMS)}")
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="FILE",
        help="UTF-8 text files (default: the standard library); for seq2seq two of them, line beside line, or .tsv, "
        ".mo, and folders or wheels with a JSON file for each language; or a folder of images (default: Fashion-MNIST) "
        "or of recordings",
    )
    sizes = "; ".join(f"{name}: {', '.join(program.configs)}" for name, program in PROGRAMS.items())
    parser.add_argument("--config", help=f"the size (default: small). {sizes}")
    _add_run_options(parser)
    own = parser.add_argument_group("of single programs")
    for side, language in (("source", "en"), ("target", "de")):
        own.add_argument(f"--{side}-language", metavar="NAME", help=f"seq2seq: as files name it (default: {language})")
    own.add_argument("--likelihood", help="vae: logistic (default), gaussian, or bernoulli in black and white")
    own.add_argument("--shift", metavar="N", help="vae, vit: move training images by up to N pixels (default: 0)")
    own.add_argument("--flip", action="store_const", const="yes", help="vae, vit: flip half of the training images")
    parser.set_defaults(func=_train)


def add_fine_tune_parser(subparsers: Subparsers) -> None:
    """Adds `torchweld fine-tune TASK`; its `func` takes the parsed arguments and returns the exit code."""
    parser = subparsers.add_parser(
        "fine-tune",
        help="teach a trained BERT what texts are labelled with, or where they have answers",
        description="Fine-tunes a BERT, of `torchweld train` or of Hugging Face, on labelled texts: classify learns "
        "labels, regress numbers, tag the tags of words; answer learns from SQuAD's JSON where a text answers a "
        "question. A tenth of the texts each is for validation and for the test, on which it is shown beside a bag of "
        "words, each word's most frequent tag, or words near the question's. The weights of the best validation are "
        "kept.",
        epilog=_EXIT,
    )
    parser.add_argument("name", metavar="TASK", help=f"what to learn: {', '.join(TASKS)}")
    parser.add_argument(
        "--checkpoint", metavar="DIR", help="config.json, model.safetensors and tokenizer.json of a BERT"
    )
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="FILE",
        help="labelled texts: .csv, .jsonl, or with tabs between the columns; for answer SQuAD's .json; "
        "for tag a word and its tag a line, as CoNLL's",
    )
    for column, last in (("text", "1"), ("label", LAST)):
        parser.add_argument(
            f"--{column}",
            metavar="COLUMN",
            help=f"its name, or its number in files without names (default: {column}; of tag: {last})",
        )
    parser.add_argument("--test", metavar="FILE", help="answer, tag: the test (default: a tenth of --data)")
    add_window_options(parser)
    parser.add_argument(
        "--epochs", type=whole(1), metavar="N", help="passes over the texts, in place of --steps (default: 1)"
    )
    _add_run_options(parser)
    parser.set_defaults(func=_fine_tune, config=None)


def add_classify_parser(subparsers: Subparsers) -> None:
    """Adds `torchweld classify`; its `func` takes the parsed arguments and returns the exit code."""
    parser = subparsers.add_parser(
        "classify",
        help="say of each line, of images or of spoken words what a model has learned",
        description="Reads lines and writes for each the label and its probability, or the number, and the line. A ViT "
        "takes the names of images, an AST those of WAV files with a word each.",
    )
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a model, or the --out of a run")
    parser.add_argument(
        "file", nargs="*", metavar="FILE", help="of texts (default: standard input), or images or WAV files"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    add_machine_options(parser)
    parser.set_defaults(func=_classify)


def add_generate_parser(subparsers: Subparsers) -> None:
    """Adds `torchweld generate`; its `func` takes the parsed arguments and returns the exit code."""
    parser = subparsers.add_parser(
        "generate",
        help="continue a text with a trained model",
        description="Continues a text with a checkpoint of `torchweld train`, or with a local Hugging Face GPT-2.",
    )
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a checkpoint, or the --out of a run")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="the text to continue (default: none)")
    parser.add_argument("--tokens", type=whole(1), default=200, metavar="N", help="at most (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=number(0.0), default=0.8, metavar="X", help="0: the likeliest (default: %(default)s)"
    )
    parser.add_argument("--top-k", type=whole(1), metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument(
        "--top-p", type=number(0.0, 1.0, above=True), metavar="P", help="draw from the likeliest that together reach P"
    )
    parser.add_argument("--seed", type=whole(0), metavar="N", help="the same text each time (default: another one)")
    add_machine_options(parser)
    parser.set_defaults(func=_generate)


def add_fill_mask_parser(subparsers: Subparsers) -> None:
    """Adds `torchweld fill-mask`; its `func` takes the parsed arguments and returns the exit code."""
    parser = subparsers.add_parser(
        "fill-mask",
        help="the words that a BERT expects in place of [MASK]",
        description="Writes a line for each [MASK] in the texts: the likeliest words and their probabilities.",
    )
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a model, or the --out of a run")
    parser.add_argument("text", nargs="+", metavar="TEXT", help="with [MASK] in it")
    parser.add_argument("--top", type=whole(1), default=5, metavar="K", help="words (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object a text")
    add_machine_options(parser)
    parser.set_defaults(func=_fill_mask)


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dataset",
        metavar="NAME[:CONFIG]",
        help="in place of --data: a data set of text, pairs or ratings that Hugging Face's datasets loads, by its name "
        "or from a folder (pip install torchweld[hub])",
    )
    parser.add_argument("--out", metavar="DIR", help="where it all goes (default: torchweld-NAME)")
    parser.add_argument("--steps", type=whole(1), metavar="N", help="updates in all (default: the config's)")
    parser.add_argument(
        "--batch-size",
        type=whole(1),
        metavar="N",
        help="sequences (seq2seq: tokens of both languages) per step, of all processes (default: the config's)",
    )
    parser.add_argument(
        "--accumulate",
        type=whole(1),
        metavar="N",
        help="work on each batch in N parts, in the memory of one (default: 1)",
    )
    parser.add_argument(
        "--parallel",
        metavar="KIND",
        help="what several processes share: data (default), fsdp, tensor (all but vae) or context (gpt2 and gpt3)",
    )
    parser.add_argument(
        "--checkpoint-format",
        metavar="KIND",
        help="safetensors (default): whole tensors, by the first process; distributed: each process writes its parts, "
        "which `torchweld gather` makes whole (with --resume the default is what the run has)",
    )
    parser.add_argument(
        "--max-samples",
        type=whole(1),
        metavar="N",
        help="learn from the first N texts, pairs, images and recordings (each class in turn) or users of the part "
        "for training; of running text (gpt2, gpt3, bert) from as much as N sequences take (default: all)",
    )
    parser.add_argument("--optimizer", help=f"{', '.join(OPTIMIZERS)} (default: adamw)")
    parser.add_argument("--learning-rate", type=number(0.0, above=True), metavar="X", help="at its peak")
    parser.add_argument("--seed", type=whole(0), metavar="N", help="of weights, data order and sample (default: 0)")
    parser.add_argument("--validate-every", type=whole(1), metavar="N", help="steps (default: 100)")
    parser.add_argument(
        "--keep-best",
        action=argparse.BooleanOptionalAction,
        help="keep the weights of the best validation too, and show and use them in the end",
    )
    parser.add_argument(
        "--resume", nargs="?", const="", metavar="DIR", help="continue the run in DIR (default: --out), bit for bit"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run that is in --out")
    parser.add_argument(
        "--compare",
        nargs="*",
        metavar="WITH",
        help="train stock PyTorch beside it, step by step: speed and losses; torch, torch.compile (default: both)",
    )
    parser.add_argument("--dtype", default="float32", help="float32 (default), or bfloat16 by autocast")
    parser.add_argument(
        "--keep-memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on a CPU, call torchweld.keep_memory() first, for both sides of --compare",
    )
    add_machine_options(parser)


def _train(args: argparse.Namespace) -> int:
    if args.name not in PROGRAMS:
        raise UserError(f"train: expected the name of a program, one of {', '.join(PROGRAMS)}, but got {args.name!r}")
    program: Any = PROGRAMS[args.name]
    program = replace(program, options=_own_options(args, OPTIONS, program))
    return run.run(_with_dataset(args, program), program)


def _own_options(args: argparse.Namespace, names: Iterable[str], program: Choices) -> dict[str, str | None]:
    """What the command line says of the program's own options; it may not say anything of another's."""
    given = {name: getattr(args, name) for name in names}
    for name, value in given.items():
        if value is not None and name not in program.defaults:
            raise UserError(f"--{name.replace('_', '-')}: expected a program that has this option, but got {args.name}")
    return {name: None if given[name] is None else str(given[name]) for name in program.defaults}


def _fine_tune(args: argparse.Namespace) -> int:
    if args.name not in TASKS:
        raise UserError(f"fine-tune: expected one of {', '.join(TASKS)}, but got {args.name!r}")
    if args.test is not None:  # the run may be resumed from elsewhere
        args.test = str(Path(args.test).absolute())
    program: Any = TASKS[args.name](args.name, {}, epochs=args.epochs or 1)
    program = replace(program, options=_own_options(args, TASK_OPTIONS, program))
    if args.epochs is not None and not (args.resume is None and args.steps is None):
        raise UserError(
            "--epochs: expected a fresh run without --steps, but got --resume or --steps; use --steps alone"
        )
    if args.resume is None:
        if args.checkpoint is None:
            raise UserError(
                "fine-tune: expected a trained BERT, but got none; name its directory with --checkpoint, or a run with "
                "--resume"
            )
        directory = checkpoint.locate(Path(args.checkpoint), to_use=True)
        config, weights = checkpoint.load_model(directory, program.read_config)
        tokenizer = checkpoint.load_tokenizer(directory, config)
        program = replace(program, config=config, weights=weights, tokenizer=tokenizer)
    elif args.checkpoint is not None:
        raise UserError("--checkpoint: expected none beside --resume, whose run has its own weights, but got one")
    return run.run(_with_dataset(args, program), program)


def _with_dataset(args: argparse.Namespace, program: Any) -> argparse.Namespace:
    """With the file of --dataset as --data."""
    if args.dataset is None:
        return args
    for option, given in (("--data", args.data), ("--resume", args.resume)):
        if given is not None:
            raise UserError(f"--dataset: expected none beside {option}, which names the data already, but got one")
    path, said = hub.load(args.dataset, args.name, program.options)
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(said + "\n")
    return argparse.Namespace(**{**vars(args), "data": [path]})


def _classify(args: argparse.Namespace) -> int:
    return classify.run(args)


def _fill_mask(args: argparse.Namespace) -> int:
    return fill_mask.run(args)


def _generate(args: argparse.Namespace) -> int:
    return generate.run(args)
