"""`torchweld sample`: images that a VAE makes up, ways from one to another, and what is left of given ones."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from torchweld.errors import UserError
from torchweld.models.vae import VAE, VAEConfig
from torchweld.training import checkpoint, images
from torchweld.training.arguments import add_machine_options, whole
from torchweld.training.images import Images, pillow
from torchweld.training.machine import forced_backend, pick_device

COLUMNS = 10
GAP = 2  # pixels between images
MOST_CLASSES = 20  # of the rows of a picture


def _noise(model: VAE, count: int, seed: int) -> Tensor:
    drawn = torch.randn(count, model.config.latents, generator=torch.Generator().manual_seed(seed))
    return drawn.to(model.prior_mean.device)


@torch.no_grad()
def samples(model: VAE, classes: Sequence[int], seed: int) -> Tensor:
    """A row of images for each of `classes`: (rows, COLUMNS, C, H, W)."""
    labels = torch.tensor(classes, device=model.prior_mean.device).repeat_interleave(COLUMNS)
    z = model.prior(labels, _noise(model, len(labels), seed))
    return model(z).unflatten(0, (len(classes), COLUMNS))


@torch.no_grad()
def interpolations(model: VAE, classes: Sequence[int], seed: int) -> Tensor:
    """In each row the way from a sample of a class to one of the next class: (rows, COLUMNS, C, H, W)."""
    labels = torch.tensor(classes, device=model.prior_mean.device)
    ends = model.prior(labels.repeat(2), _noise(model, 2 * len(labels), seed))
    first, last = ends[: len(labels)], ends[len(labels) :].roll(-1, 0)
    share = torch.linspace(0, 1, COLUMNS, device=ends.device)[:, None]
    z = first[:, None] * (1 - share) + last[:, None] * share
    return model(z.flatten(0, 1)).unflatten(0, z.shape[:2])


@torch.no_grad()
def reconstructions(model: VAE, given: Images) -> Tensor:
    """Images, and below each of them what is left of it: (rows, COLUMNS, C, H, W)."""
    x = given.pixels.float().to(model.prior_mean.device) / 255
    pairs = zip(x.split(COLUMNS), model.reconstruct(x).split(COLUMNS), strict=True)
    return torch.stack([row for pair in pairs for row in pair])


def gallery(model: VAE, test: Images, seed: int) -> dict[str, Tensor]:
    """A picture of each kind, by its name."""
    classes = range(min(MOST_CLASSES, model.config.classes))
    found = {"samples": samples(model, classes, seed), "interpolation": interpolations(model, classes, seed)}
    if len(test) >= 5 * COLUMNS:
        found["reconstruction"] = reconstructions(model, test.part(range(5 * COLUMNS)))
    return found


def write(path: Path, rows: Tensor) -> Path:
    """Draws images (rows, columns, C, H, W) into a PNG.

    Raises:
        UserError: Pillow is missing, or the file cannot be written.
    """
    image = pillow("a PNG")
    across, down = rows.shape[1], rows.shape[0]
    c, h, w = rows.shape[2:]
    canvas = torch.full((c, down * (h + GAP) + GAP, across * (w + GAP) + GAP), 255, dtype=torch.uint8)
    for i, row in enumerate((rows * 255).round().to(torch.uint8).cpu()):
        for j, one in enumerate(row):
            y, x = GAP + i * (h + GAP), GAP + j * (w + GAP)
            canvas[:, y : y + h, x : x + w] = one
    array = canvas.permute(1, 2, 0).numpy()
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        image.fromarray(array.squeeze(-1) if c == 1 else array).save(aside, "PNG")
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"{path}: expected a file that can be written, but got: {error.strerror or error}") from None
    return path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `torchweld sample`; its `func` takes the parsed arguments and returns the exit code."""
    parser = subparsers.add_parser(
        "sample",
        help="images that a trained VAE makes up",
        description="Draws images of a trained VAE into a PNG: a row for each class, or of one class.",
    )
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a checkpoint, or the --out of a run")
    parser.add_argument("--class", dest="label", metavar="NAME", help="of the images (default: a row for each)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--grid", dest="kind", action="store_const", const="grid", help="samples (default)")
    kind.add_argument(
        "--interpolate", dest="kind", action="store_const", const="interpolate", help="the way from sample to sample"
    )
    kind.add_argument(
        "--reconstruct",
        dest="kind",
        action="store_const",
        const="reconstruct",
        help="test images of --data, and below each what is left of it after the latents",
    )
    parser.add_argument("--data", nargs=1, metavar="DIR", help="images for --reconstruct, as for `torchweld train vae`")
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of the draws (default: 0)")
    parser.add_argument("--out", default="sample.png", metavar="FILE", help="a PNG (default: %(default)s)")
    add_machine_options(parser)
    parser.set_defaults(func=run, kind="grid")


def run(args: argparse.Namespace) -> int:
    """Writes the picture."""
    device = pick_device(args.device)
    pillow("sample")
    directory = checkpoint.locate(Path(args.checkpoint), to_use=True)
    config, weights = checkpoint.load_model(directory, VAEConfig.from_json)
    classes = _classes(config, args.label)
    with forced_backend(args.backend, device):
        model = VAE(config).eval()
        model.load_hugging_face(weights)
        model.to(device)
        if args.kind == "reconstruct":
            rows = reconstructions(model, _given(args.data, config, classes))
        else:
            rows = (interpolations if args.kind == "interpolate" else samples)(model, classes, args.seed)
        sys.stdout.write(f"{write(Path(args.out), rows)}\n")
    return 0


def _classes(config: VAEConfig, label: str | None) -> Sequence[int]:
    """The class of each row."""
    if label is None:
        return range(min(MOST_CLASSES, config.classes)) if config.classes > 1 else [0] * COLUMNS
    if label not in config.labels:
        raise UserError(f"--class: expected one of {', '.join(config.labels)}, but got {label!r}")
    return [config.labels.index(label)] * COLUMNS


def _given(data: list[str] | None, config: VAEConfig, classes: Sequence[int]) -> Images:
    """The first images of the test, of the wanted classes."""
    pictures = images.load(data)
    if pictures.shape != (config.channels, config.height, config.width):
        raise UserError(
            f"--data: expected images of {config.height} x {config.width} with {config.channels} channel(s), as the "
            f"model's, but got {pictures.shape[1]} x {pictures.shape[2]} with {pictures.shape[0]}"
        )
    if config.levels == 2:
        pictures = images.black_and_white(pictures)
    wanted = torch.isin(pictures.test.labels, torch.tensor(classes)).nonzero()[:, 0]
    count = min(5 * COLUMNS, len(wanted) // COLUMNS * COLUMNS)
    if not count:
        raise UserError(f"--data: expected at least {COLUMNS} images for the test, but got {len(wanted)}")
    return pictures.test.part(wanted[:count])
