"""The `torchweld` command: info, check, bench, train, fine-tune, gather, generate, classify, answer, tag, fill-mask,
translate, sample, recommend, data, prepare.

Exit codes: 0 done, 1 a check missed, 2 bad input (one line on stderr, no traceback), 130 interrupted, 141 reader left.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from torchweld import __version__, backend
from torchweld.errors import UserError

# Each command's module, and the function in it that adds the parser. Only the module of the called command is imported.
_COMMANDS = {
    "info": ("torchweld.cli.info", "add_parser"),
    "check": ("torchweld.cli.check", "add_parser"),
    "bench": ("torchweld.bench.command", "add_parser"),
    "train": ("torchweld.training.commands", "add_train_parser"),
    "fine-tune": ("torchweld.training.commands", "add_fine_tune_parser"),
    "gather": ("torchweld.training.gather", "add_parser"),
    "generate": ("torchweld.training.commands", "add_generate_parser"),
    "classify": ("torchweld.training.commands", "add_classify_parser"),
    "answer": ("torchweld.training.answer", "add_parser"),
    "tag": ("torchweld.training.tag", "add_parser"),
    "fill-mask": ("torchweld.training.commands", "add_fill_mask_parser"),
    "translate": ("torchweld.training.translate", "add_parser"),
    "sample": ("torchweld.training.sample", "add_parser"),
    "recommend": ("torchweld.training.recommend", "add_parser"),
    "data": ("torchweld.training.packages", "add_parser"),
    "prepare": ("torchweld.training.prepare", "add_parser"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"torchweld: error: {message} (see `{self.prog} --help`)\n")


def _parser(chosen: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="torchweld", description="Fused attention, norms, GELU, cross-entropy, Adam and SGD for PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"torchweld {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in chosen:
        module, function = _COMMANDS[name]
        getattr(importlib.import_module(module), function)(subparsers)
    return parser


def _check_environment() -> None:
    """Raises UserError if this machine does not have what TORCHWELD_BACKEND or TORCHWELD_CPU_ISA names."""
    try:
        with backend.use_backend("reference"):
            pass
        if "cpu" in backend.kernels:
            backend.kernels["cpu"].isa()
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parser([arguments[0]] if arguments and arguments[0] in _COMMANDS else list(_COMMANDS)).parse_args(arguments)
    try:
        _check_environment()
        return int(args.func(args))
    except ValueError as error:  # UserError is a ValueError, and so are the errors of the ops for impossible arguments
        print(f"torchweld: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("torchweld: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `torchweld ... | head`: head has ended. The last flush of the interpreter must not fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def command() -> NoReturn:
    """The command: runs main and exits.

    One of several processes exits at once, without the interpreter's shutdown: gloo's threads still run then, and the
    shutdown can abort.
    """
    code = main()
    if "LOCAL_RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


if __name__ == "__main__":
    command()
