"""`torchweld gather`: the parts of a distributed checkpoint become the files of any other."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchweld import ops
from torchweld.errors import UserError
from torchweld.training import checkpoint, shards
from torchweld.training.commands import TASKS
from torchweld.training.processes import Processes
from torchweld.training.programs import PROGRAMS
from torchweld.training.sharing import Sharing

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> None:
    """Adds `torchweld gather`; its `func` takes the parsed arguments and returns the exit code."""
    parser = subparsers.add_parser(
        "gather",
        help="make one file of the parts that --checkpoint-format distributed wrote",
        description="Reads the parts of a checkpoint in one process and writes model.safetensors and "
        "optimizer.safetensors in their place, which Hugging Face's transformers and all other commands read.",
    )
    parser.add_argument("directory", metavar="DIR", help="a checkpoint, or the --out of a run: all that it has")
    parser.set_defaults(func=_run)


def gather(checkpoint_directory: Path) -> None:
    """Makes the parts of one checkpoint whole, in its folder.

    Raises:
        UserError: the parts are damaged or of an unknown program, or the files cannot be written.
    """
    source = checkpoint_directory
    name = checkpoint.read_json(source / checkpoint.PARTS).get("program")
    if name in TASKS:
        program: Any = TASKS[name](name, {})
    elif name in PROGRAMS:
        program = PROGRAMS[name]
    else:
        raise checkpoint.damaged(source / checkpoint.PARTS, f"the program {name!r}")
    model = program.model(checkpoint.load_config(source, program.read_config), ops)
    optimizer = None
    if (source / "training.json").is_file():
        settings = checkpoint.load_training(source)["settings"]
        optimizer = str(settings.get("optimizer"))
    shards.gather(source, model, Sharing(program, Processes()), optimizer)


def _run(args: argparse.Namespace) -> int:
    directory = Path(args.directory)
    newest = checkpoint.locate(directory)
    every = [newest] if newest == directory else [*checkpoint.checkpoints(directory)]
    if newest != directory:
        every += checkpoint.checkpoints(directory, "best")
    found = [each for each in every if checkpoint.in_parts(each)]
    if not found:
        raise UserError(
            f"gather {directory}: expected a checkpoint of --checkpoint-format distributed, but {newest} has "
            f"model.safetensors already"
        )
    for each in found:
        gather(each)
        sys.stdout.write(f"{each / 'model.safetensors'}\n")
    return 0
