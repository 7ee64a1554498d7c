"""`torchweld train vae`: images, the bits that they cost, and what the model makes up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchweld.errors import UserError
from torchweld.models import vae
from torchweld.training import coders, images, order, sample
from torchweld.training.findings import Findings
from torchweld.training.images import Augmentation, Images, Pictures
from torchweld.training.program import Batch, Outcome
from torchweld.training.settings import Recipe, Settings

BITS, ERROR = "bits per number", "squared error"
AT_ONCE = 500


@dataclass(frozen=True)
class AutoEncoder:
    """The program."""

    name: str = "vae"
    command: str = "train vae"
    title: str = "VAE"
    input: str = "images"
    unit: str = "bits per number"
    counted: str = "images"
    has_heads: bool = False  # it has no layers that tensor parallel could cut
    options: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def defaults(self) -> Mapping[str, str]:
        return {"likelihood": "logistic", "shift": "0", "flip": "no"}

    @property
    def configs(self) -> Mapping[str, vae.VAEConfig]:
        return vae.CONFIGS

    @property
    def recipes(self) -> Mapping[str, Recipe]:
        return RECIPES

    def data(self, settings: Settings, config: vae.VAEConfig, source: Path | None = None) -> Pictures:
        """The images, split; as in `Program`."""
        Augmentation.of(settings.options)
        levels = vae.likelihood(settings.options["likelihood"]).levels
        pictures = images.load(settings.data, settings.max_samples)
        return images.black_and_white(pictures) if levels == 2 else pictures

    def fit(self, settings: Settings, config: vae.VAEConfig, data: Pictures) -> tuple[Settings, vae.VAEConfig]:
        """The size of an image and the classes."""
        channels, height, width = data.shape
        config = replace(config, channels=channels, height=height, width=width, labels=data.labels)
        return settings, replace(config, likelihood=settings.options["likelihood"])

    def model(self, config: vae.VAEConfig, ops: ModuleType) -> vae.VAE:
        """As in `Program`."""
        return vae.VAE(config, ops)

    def batches(self, data: Pictures, settings: Settings, config: vae.VAEConfig, step: int, parts: int) -> list[Batch]:
        """The next images of an order that is drawn for each epoch, varied, and noise."""
        size, rng = settings.batch_size, np.random.default_rng((settings.seed, step))
        chosen = data.training.part(order.chosen(settings.seed, len(data.training), step, size))
        varied = replace(chosen, pixels=Augmentation.of(settings.options)(chosen.pixels, rng))
        return [_batch(varied.part(part), config, rng) for part in torch.arange(size).chunk(parts)]

    def validation(self, data: Pictures, settings: Settings, config: vae.VAEConfig) -> list[Batch]:
        """All images of validation, with the same noise every time."""
        return _batches(data.validation, config)

    def losses(self, model: vae.VAE, *tensors: Tensor) -> dict[str, Tensor]:
        """The cost of an image after its latents, and that of the latents."""
        return model.losses(*tensors)

    def read_config(self, values: dict[str, Any]) -> vae.VAEConfig:
        """As in `Program`."""
        return vae.VAEConfig.from_json(values)

    def write_config(self, config: vae.VAEConfig, data: Pictures) -> dict[str, Any]:
        """As in `Program`."""
        return config.to_json()

    def describe(self, data: Pictures, settings: Settings, config: vae.VAEConfig) -> tuple[str, str]:
        """As in `Program`."""
        return images.describe(data, settings), f"{settings.batch_size} images"

    def baselines(self, data: Pictures, validation: Sequence[Batch]) -> dict[str, float]:
        """The cost of pixels whose places alone are known."""
        levels = 2 if not ((data.training.pixels > 0) & (data.training.pixels < 255)).any() else 256
        return {"independent pixels": coders.independent(data.training, data.validation, levels)}

    def show(self, outcome: Outcome, found: Findings) -> None:
        """What an image costs beside what coders need, and the errors beside PCA's; samples and reconstructions."""
        model, data = outcome.model, outcome.data
        config = model.config
        ours = judge(model, data.test, outcome.precision)
        others = {name: {BITS: cost} for name, cost in coders.bits(data, config.levels).items()}
        project = coders.principal_components(data.training, config.latents)
        others[f"PCA, {config.latents} components"] = {ERROR: _error(data.test, project)}
        found.scores(f"{len(data.test):,} images of the test", {"VAE": ours}, others)
        try:
            for name, picture in sample.gallery(model, data.test, outcome.settings.seed).items():
                found.picture(name, sample.write(outcome.out / f"{name}.png", picture), pixels=True)
        except UserError as error:
            found.print(f"samples: not drawn, {error}")
        label = f" --class '{config.labels[-1]}'" if config.classes > 1 else ""
        found.print(f"try it: torchweld sample --checkpoint {outcome.out}{label} --out sample.png")


# "small" is five epochs of Fashion-MNIST.
RECIPES = {
    "tiny": Recipe(steps=200, batch_size=32, learning_rate=4e-3, weight_decay=0.0),
    "small": Recipe(steps=2270, batch_size=128, learning_rate=2e-3, weight_decay=0.0, validate_every=454),
    "medium": Recipe(steps=9080, batch_size=128, learning_rate=1e-3, weight_decay=0.0, validate_every=454),
    "large": Recipe(steps=22700, batch_size=256, learning_rate=5e-4, weight_decay=0.0, validate_every=454),
}


def _batch(images: Images, config: vae.VAEConfig, rng: np.random.Generator) -> Batch:
    noise = torch.from_numpy(rng.standard_normal((len(images), config.latents), dtype=np.float32))
    count = len(images)
    return Batch((images.pixels.float() / 255, images.labels, noise), {"nll": count, "kl": count}, count)


def _batches(images: Images, config: vae.VAEConfig) -> list[Batch]:
    rng = np.random.default_rng(0)
    return [_batch(images.part(part), config, rng) for part in torch.arange(len(images)).split(AT_ONCE)]


@torch.no_grad()
def judge(model: vae.VAE, test: Images, precision: Any) -> dict[str, float]:
    """Bits per number, the class included, and the mean squared error of reconstructions in [0, 1]."""
    device, unit = model.prior_mean.device, model.config.dimensions * math.log(2)
    nats, error = 0.0, 0.0
    for batch in _batches(test, model.config):
        tensors = [tensor.to(device) for tensor in batch.tensors]
        with precision:
            nll, kl = model.nats(*tensors)
            left = model.reconstruct(tensors[0])
        nats += float((nll + kl).double().sum()) + len(nll) * math.log(model.config.classes)
        error += float((left - tensors[0]).double().square().mean((1, 2, 3)).sum())
    return {BITS: nats / len(test) / unit, ERROR: error / len(test)}


def _error(test: Images, project: Any) -> float:
    x = test.pixels.float() / 255
    return float((project(x) - x).double().square().mean())


VAE = AutoEncoder()
