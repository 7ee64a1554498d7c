"""`torchweld train vit`: which class an image is of, beside logistic regression; and `classify` of images."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchweld.errors import UserError
from torchweld.models import vit
from torchweld.training import checkpoint, images, logistic, order, report, scores
from torchweld.training.findings import Findings
from torchweld.training.images import Augmentation, Images, Pictures
from torchweld.training.lines import tell
from torchweld.training.machine import forced_backend, pick_device
from torchweld.training.program import Batch, Outcome
from torchweld.training.settings import Recipe, Settings

AT_ONCE = 250
MIDDLE = 0.5  # a pixel in [0, 1] becomes (pixel - MIDDLE) / MIDDLE


@dataclass(frozen=True)
class Recognition:
    """The program."""

    name: str = "vit"
    command: str = "train vit"
    title: str = "ViT"
    input: str = "images"
    unit: str = "nats per image"
    counted: str = "images"
    options: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def defaults(self) -> Mapping[str, str]:
        return {"shift": "0", "flip": "no"}

    @property
    def configs(self) -> Mapping[str, vit.ViTConfig]:
        return vit.CONFIGS

    @property
    def recipes(self) -> Mapping[str, Recipe]:
        return RECIPES

    def data(self, settings: Settings, config: vit.ViTConfig, source: Path | None = None) -> Pictures:
        """The images, split; as in `Program`."""
        Augmentation.of(settings.options)
        pictures = images.load(settings.data, settings.max_samples)
        if len(pictures.labels) < 2:
            raise UserError(
                f"--data: expected images of 2 or more classes, but got 1 ({pictures.labels[0]}); put those of each "
                f"class into a folder"
            )
        return replace(pictures, files={"preprocessor_config.json": _processor(*pictures.shape)})

    def fit(self, settings: Settings, config: vit.ViTConfig, data: Pictures) -> tuple[Settings, vit.ViTConfig]:
        """The size of an image and the classes."""
        channels, height, width = data.shape
        if height != width:
            raise UserError(f"--data: expected square images, but got {height} x {width}; pad or crop them")
        return settings, replace(config, image_size=height, num_channels=channels, labels=data.labels)

    def model(self, config: vit.ViTConfig, ops: ModuleType) -> vit.ViT:
        """As in `Program`."""
        return vit.ViT(config, ops)

    def batches(self, data: Pictures, settings: Settings, config: vit.ViTConfig, step: int, parts: int) -> list[Batch]:
        """The next images of an order that is drawn for each epoch, varied."""
        size, rng = settings.batch_size, np.random.default_rng((settings.seed, step))
        chosen = data.training.part(order.chosen(settings.seed, len(data.training), step, size))
        varied = replace(chosen, pixels=Augmentation.of(settings.options)(chosen.pixels, rng))
        return [_batch(varied.part(part)) for part in torch.arange(size).chunk(parts)]

    def validation(self, data: Pictures, settings: Settings, config: vit.ViTConfig) -> list[Batch]:
        """All images of validation."""
        return [_batch(data.validation.part(part)) for part in torch.arange(len(data.validation)).split(AT_ONCE)]

    def losses(self, model: vit.ViT, *tensors: Tensor) -> dict[str, Tensor]:
        """The mean cross-entropy of the classes."""
        return {"loss": model.loss(*tensors)}

    def read_config(self, values: dict[str, Any]) -> vit.ViTConfig:
        """As in `Program`."""
        return vit.ViTConfig.from_hugging_face(values)

    def write_config(self, config: vit.ViTConfig, data: Pictures) -> dict[str, Any]:
        """As in `Program`."""
        return config.to_hugging_face()

    def describe(self, data: Pictures, settings: Settings, config: vit.ViTConfig) -> tuple[str, str]:
        """As in `Program`."""
        return images.describe(data, settings), f"{settings.batch_size} images"

    def baselines(self, data: Pictures, validation: Sequence[Batch]) -> dict[str, float]:
        """The entropy of the classes' frequencies: what is possible without looking."""
        counts = torch.bincount(data.training.labels, minlength=len(data.labels)).double() + 1
        return {"frequencies of the classes": float(-(counts / counts.sum()).log()[data.validation.labels].mean())}

    def show(self, outcome: Outcome, found: Findings) -> None:
        """The test's scores beside those of logistic regression; classes one by one, and what was taken for what."""
        data, test = outcome.data, outcome.data.test
        with outcome.precision:
            own = torch.cat([answers(outcome.model, part) for part in test.pixels.split(AT_ONCE)])
        others = {
            "logistic regression": logistic.predict(data.training, len(data.labels), test.pixels),
            "most frequent class": torch.bincount(data.training.labels, minlength=len(data.labels)).expand_as(own),
        }
        judged = {name: scores.of_labels(said, test.labels) for name, said in others.items()}
        ours = {"ViT": scores.of_labels(own, test.labels)}
        found.scores(f"{len(test):,} images of the test", ours, judged)
        said = own.argmax(1)
        found.print(scores.each_label(said, test.labels, data.labels))
        if len(data.labels) <= scores.MOST_CONFUSED:
            found.print(scores.confusion(said, test.labels, data.labels))
        picture = outcome.out / "confusion.png"
        if report.plot_confusion(picture, scores.counts(said, test.labels, len(data.labels)), data.labels):
            found.picture("what was taken for what", picture)
        found.print(f"try it: torchweld classify --checkpoint {outcome.out} IMAGE ...")


# "small" is two epochs of Fashion-MNIST; the published sizes want a GPU and more images.
RECIPES = {
    "tiny": Recipe(steps=200, batch_size=32, learning_rate=3e-3, weight_decay=0.05),
    "small": Recipe(steps=1800, batch_size=64, learning_rate=1e-3, weight_decay=0.05, validate_every=300),
    "medium": Recipe(steps=10000, batch_size=128, learning_rate=1e-3, weight_decay=0.05, validate_every=500),
    "vit-base": Recipe(steps=20000, batch_size=512, learning_rate=1e-3, beta2=0.999, accumulate=4),
    "vit-large": Recipe(steps=20000, batch_size=512, learning_rate=6e-4, beta2=0.999, accumulate=8),
    "vit-huge": Recipe(steps=20000, batch_size=512, learning_rate=4e-4, beta2=0.999, accumulate=16),
}


def _processor(channels: int, height: int, width: int) -> str:
    """What `transformers` makes of an image what `_scaled` does."""
    values = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": height, "width": width},
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [MIDDLE] * channels,
        "image_std": [MIDDLE] * channels,
    }
    return json.dumps(values, indent=1) + "\n"


def _scaled(pixels: Tensor) -> Tensor:
    return (pixels.float() / 255 - MIDDLE) / MIDDLE


def _batch(given: Images) -> Batch:
    return Batch((_scaled(given.pixels), given.labels), {"loss": len(given)}, len(given))


@torch.no_grad()
def answers(model: vit.ViT, pixels: Tensor) -> Tensor:
    """The logits of images (N, C, H, W) of uint8, in float32 on the CPU: (N, labels)."""
    return model(_scaled(pixels).to(model.first.device)).float().cpu()


def classify(args: argparse.Namespace, directory: Path) -> int:
    """`torchweld classify` of images: a line for each, with tabs between its parts."""
    device = pick_device(args.device)
    config, weights = checkpoint.load_model(directory, vit.ViTConfig.from_hugging_face)
    if not args.file:
        raise UserError("classify: expected the names of images, but got none; a ViT reads no text")
    with forced_backend(args.backend, device):
        model = vit.ViT(config).eval()
        model.load_hugging_face(weights)
        model.to(device)
        pixels = [images.open_as(Path(path), config.num_channels, config.image_size) for path in args.file]
        logits = torch.cat(
            [answers(model, torch.stack(pixels[i : i + AT_ONCE])) for i in range(0, len(pixels), AT_ONCE)]
        )
        tell(args.file, logits, config.labels, args.json)
    return 0


VIT = Recognition()
