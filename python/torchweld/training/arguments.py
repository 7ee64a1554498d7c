"""What the commands read from the command line alike."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """--device and --backend."""
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--backend", help="force cuda, cpu or reference (default: the best one for the device)")


def add_window_options(parser: argparse.ArgumentParser) -> None:
    """--window and --stride, of the contexts of questions."""
    parser.add_argument(
        "--window",
        type=whole(1),
        metavar="N",
        help="tokens of question and context at once (default: 384, or all positions)",
    )
    parser.add_argument(
        "--stride", type=whole(1), metavar="N", help="tokens from one window of a context to the next (default: 128)"
    )


def whole(least: int) -> Callable[[str], int]:
    """Reads a whole number >= `least`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        # Seeds and sizes end up in torch's 64 bits.
        if value is None or not least <= value < 2**63:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, but got {text!r}")
        return value

    return read


def number(least: float, most: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """Reads a finite number from `least` (or, with `above`, from just above it) to `most`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and least <= value <= most) or (above and value == least):
            lower = f"above {least:g}" if above else f"of at least {least:g}"
            upper = f" and at most {most:g}" if most < math.inf else ""
            raise argparse.ArgumentTypeError(f"expected a number {lower}{upper}, but got {text!r}")
        return value

    return read
