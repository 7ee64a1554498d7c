"""`torchweld recommend`: what follows the items that someone had."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from torchweld.errors import UserError
from torchweld.models.gpt2 import GPT2, GPT2Config
from torchweld.training import checkpoint
from torchweld.training.arguments import add_machine_options, whole
from torchweld.training.machine import forced_backend, pick_device
from torchweld.training.recommendation import likeliest


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `torchweld recommend`; its `func` takes the parsed arguments and returns the exit code."""
    parser = subparsers.add_parser(
        "recommend",
        help="what follows the items that someone had",
        description="Writes what a model of `torchweld train recommender` expects after the given items, the likeliest "
        "first, and the probabilities.",
    )
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a checkpoint, or the --out of a run")
    parser.add_argument("item", nargs="+", metavar="ITEM", help="titles or ids of items, the oldest first")
    parser.add_argument("--top", type=whole(1), default=10, metavar="K", help="how many (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object an item")
    add_machine_options(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Writes a line for each item."""
    device = pick_device(args.device)
    directory = checkpoint.locate(Path(args.checkpoint), to_use=True)
    config, weights = checkpoint.load_model(directory, GPT2Config.from_hugging_face)
    ids, titles = _items(directory, config)
    history = [_number(name, ids, titles) for name in args.item]
    with forced_backend(args.backend, device):
        model = GPT2(config).eval()
        model.load_hugging_face(weights)
        model.to(device)
        for item, probability in likeliest(model, history, args.top):
            if args.json:
                line = {"id": ids[item - 1], "title": titles[item - 1], "probability": round(probability, 4)}
                sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
            else:
                sys.stdout.write(f"{probability:.4f}\t{titles[item - 1]}\n")
    return 0


def _items(directory: Path, config: GPT2Config) -> tuple[list[str], list[str]]:
    """Ids and titles, from items.json."""
    items = checkpoint.read_json(directory / "items.json", list)
    try:
        ids, titles = ([str(item[name]) for item in items] for name in ("id", "title"))
    except (KeyError, TypeError):
        ids, titles = [], []
    if len(ids) != config.vocab_size - 1:
        raise UserError(
            f"{directory / 'items.json'}: expected id and title of {config.vocab_size - 1} items, but got {len(ids)}"
        )
    return ids, titles


def _number(name: str, ids: Sequence[str], titles: Sequence[str]) -> int:
    """The number of an item by its title, whatever its case and with or without its year, or by its id."""
    if name in titles or name in ids:
        return 1 + (titles.index(name) if name in titles else ids.index(name))
    plain = [title.casefold() for title in titles]
    bare = [title.rpartition(" (")[0] or title for title in plain]
    for names in (plain, bare):
        if names.count(name.casefold()) == 1:
            return 1 + names.index(name.casefold())
    near = dict(zip(bare + plain, [*titles, *titles], strict=True))
    close = dict.fromkeys(near[match] for match in get_close_matches(name.casefold(), near, 6, 0.0))
    raise UserError(
        f"ITEM: expected the title or the id of an item, but got {name!r}; the closest titles are "
        f"{', '.join(map(repr, list(close)[:3]))}"
    )
