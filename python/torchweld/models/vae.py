"""A convolutional variational autoencoder whose prior is a Gaussian for each class of images.

Kingma and Welling, "Auto-Encoding Variational Bayes", arXiv:1312.6114. The encoder gives q(z|x), the decoder p(x|z).
For an image x of class y, nll + kl bounds -log p(x|y): nll is -log p(x|z) for a z drawn from q(z|x), kl the divergence
of q(z|x) from p(z|y), the prior of the class. Each likelihood gives probabilities of whole levels, so the bound is the
length of a code. Dimensions: B batch, images (C, H, W), Z = latents.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import torchweld.ops
from torchweld.errors import UserError
from torchweld.models.published import Published, check_config, check_sizes

NARROWEST = -7.0  # the least log of a logistic's scale; a level of 256 is as wide as exp(-5.5)
_SIZES = ["channels", "height", "width", "classes", "filters", "hidden", "latents"]


@dataclass(frozen=True)
class Likelihood:
    """p(x|z) of numbers in [0, 1].

    Attributes:
        levels: how many values a number can have.
        outputs: what the decoder says of each number.
        learned: whether one more parameter is the same for all numbers.
        nll: x (B, C, H, W), what the decoder says (B, outputs, C, H, W), and the learned parameter -> -log p(x|z) of
            each number in nats, (B, C, H, W).
        mean: what the decoder says -> the expected images.
    """

    levels: int
    outputs: int
    learned: bool
    nll: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    mean: Callable[[Tensor], Tensor]


def _logistic(x: Tensor, says: Tensor, learned: Tensor | None) -> Tensor:
    """A logistic distribution, of which each level has its interval and the outermost ones all that lies beyond.

    Kingma et al., arXiv:1606.04934, equation 23. With a > b the probability of an interval is
    sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)), whose factors keep their digits.
    """
    mean, scale = says[:, 0], says[:, 1].clamp_min(NARROWEST)
    half, inverse = 0.5 / 255, torch.exp(-scale)
    below, above = x < half, x > 1 - half
    upper = F.softplus(-(x - mean + half) * inverse).masked_fill(above, 0.0)
    lower = F.softplus((x - mean - half) * inverse).masked_fill(below, 0.0)
    between = torch.log(-torch.expm1(-2 * half * inverse)).masked_fill(below | above, 0.0)
    return upper + lower - between


def _gaussian(x: Tensor, says: Tensor, learned: Tensor | None) -> Tensor:
    """The squared error over a variance that is learned; the mean is the decoder's output.

    The density in the middle of a level times its width is the level's probability: from a deviation of one level on,
    the sum over all levels is 1 to nine digits.
    """
    assert learned is not None
    level = 1 / 255
    deviation = F.softplus(learned) + level
    return 0.5 * ((x - says[:, 0]) / deviation).square() + torch.log(deviation * math.sqrt(2 * math.pi) / level)


def _bernoulli(x: Tensor, says: Tensor, learned: Tensor | None) -> Tensor:
    """Black or white."""
    return F.binary_cross_entropy_with_logits(says[:, 0], x, reduction="none")


LIKELIHOODS = {
    "logistic": Likelihood(256, 2, False, _logistic, lambda says: says[:, 0].clamp(0, 1)),
    "gaussian": Likelihood(256, 1, True, _gaussian, lambda says: says[:, 0].clamp(0, 1)),
    "bernoulli": Likelihood(2, 1, False, _bernoulli, lambda says: says[:, 0].sigmoid()),
}


def likelihood(name: str) -> Likelihood:
    """That of `name`.

    Raises:
        UserError: there is none.
    """
    if name not in LIKELIHOODS:
        raise UserError(f"likelihood: expected one of {', '.join(LIKELIHOODS)}, but got {name!r}")
    return LIKELIHOODS[name]


@dataclass(frozen=True)
class VAEConfig:
    """The shape of a VAE.

    Attributes:
        channels, height, width: of an image; height and width are multiples of 4.
        labels: the names of the classes; one name where there are no classes.
        filters: channels at half the resolution; a quarter of it has twice as many.
        hidden: width of the layer between the image and the latents, on both sides.
        likelihood: a name out of `LIKELIHOODS`.
    """

    channels: int = 1
    height: int = 28
    width: int = 28
    labels: tuple[str, ...] = ("",)
    filters: int = 32
    hidden: int = 256
    latents: int = 16
    likelihood: str = "logistic"

    def __post_init__(self) -> None:
        check_sizes(self, _SIZES)
        if self.height % 4 or self.width % 4:
            raise UserError(
                f"VAEConfig: expected height and width divisible by 4, but got {self.height} x {self.width}; "
                f"pad or crop the images"
            )
        likelihood(self.likelihood)

    @property
    def classes(self) -> int:
        return len(self.labels)

    @property
    def dimensions(self) -> int:
        """Numbers in an image."""
        return self.channels * self.height * self.width

    @property
    def levels(self) -> int:
        """Values that a number in an image can have."""
        return likelihood(self.likelihood).levels

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> VAEConfig:
        """From the contents of a `config.json`.

        Raises:
            UserError: of another model.
        """
        names = [field.name for field in fields(cls)]
        check_config("VAE", values, {"model_type": ["torchweld-vae"]}, names)
        return cls(**{**{name: values[name] for name in names}, "labels": tuple(values["labels"])})

    def to_json(self) -> dict[str, Any]:
        """The contents of `config.json`."""
        return {"model_type": "torchweld-vae", **asdict(self)}


CONFIGS = {
    "tiny": VAEConfig(filters=8, hidden=32, latents=8),
    "small": VAEConfig(),
    "medium": VAEConfig(filters=64, hidden=512, latents=32),
    "large": VAEConfig(filters=128, hidden=1024, latents=64),
}


class Residual(nn.Module):
    """x + conv(gelu(norm(conv(gelu(norm(x)))))); He et al., arXiv:1603.05027, with group norm (arXiv:1803.08494)."""

    def __init__(self, filters: int, ops: ModuleType) -> None:
        super().__init__()
        self.gelu = ops.gelu
        groups = math.gcd(8, filters)
        self.norm_1, self.norm_2 = nn.GroupNorm(groups, filters), nn.GroupNorm(groups, filters)
        self.conv_1, self.conv_2 = (nn.Conv2d(filters, filters, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, filters, h, w) -> the same."""
        y = self.conv_1(self.gelu(self.norm_1(x)))
        return x + self.conv_2(self.gelu(self.norm_2(y)))


class Gelu(nn.Module):
    def __init__(self, ops: ModuleType) -> None:
        super().__init__()
        self.gelu = ops.gelu

    def forward(self, x: Tensor) -> Tensor:
        return self.gelu(x)


class VAE(Published):
    """The model on the functions of `ops`: `torchweld.ops`, or `torchweld.models.stock` for stock PyTorch."""

    title = "VAE"

    def __init__(self, config: VAEConfig, ops: ModuleType = torchweld.ops) -> None:
        super().__init__()
        self.config, self.likelihood = config, likelihood(config.likelihood)
        n, latents = config.filters, config.latents
        inner = (2 * n, config.height // 4, config.width // 4)
        flat = math.prod(inner)
        self.encoder = nn.Sequential(
            nn.Conv2d(config.channels, n, 4, stride=2, padding=1),
            Gelu(ops),
            nn.Conv2d(n, 2 * n, 4, stride=2, padding=1),
            Residual(2 * n, ops),
            Gelu(ops),
            nn.Flatten(),
            nn.Linear(flat, config.hidden),
            Gelu(ops),
            nn.Linear(config.hidden, 2 * latents),
        )
        self.decoder = nn.Sequential(
            nn.Linear(latents, config.hidden),
            Gelu(ops),
            nn.Linear(config.hidden, flat),
            nn.Unflatten(1, inner),
            Residual(2 * n, ops),
            Gelu(ops),
            nn.ConvTranspose2d(2 * n, n, 4, stride=2, padding=1),
            Gelu(ops),
            nn.ConvTranspose2d(n, self.likelihood.outputs * config.channels, 4, stride=2, padding=1),
        )
        self.prior_mean = nn.Parameter(torch.randn(config.classes, latents))
        self.prior_scale = nn.Parameter(torch.zeros(config.classes, latents))  # logs
        if self.likelihood.outputs > 1:  # the log of a scale begins where most errors of an untrained decoder are
            with torch.no_grad():
                last: Any = self.decoder[-1]
                last.bias[config.channels :].fill_(-2.0)
        self.learned = nn.Parameter(torch.tensor([-2.0])) if self.likelihood.learned else None

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log of the deviation of q(z|x): (B, C, H, W) -> (B, Z) twice."""
        mean, scale = self.encoder(images).float().chunk(2, dim=1)
        return mean, scale

    def decode(self, z: Tensor) -> Tensor:
        """What p(x|z) is made of: (B, Z) -> (B, outputs, C, H, W)."""
        return self.decoder(z).float().unflatten(1, (self.likelihood.outputs, -1))

    def forward(self, z: Tensor) -> Tensor:
        """The expected images: (B, Z) -> (B, C, H, W), in [0, 1]."""
        return self.likelihood.mean(self.decode(z))

    def prior(self, labels: Tensor, noise: Tensor) -> Tensor:
        """Draws of p(z|y): classes (B) and normal noise (B, Z) -> (B, Z)."""
        return self.prior_mean[labels] + self.prior_scale[labels].exp() * noise

    def nats(self, images: Tensor, labels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """nll and kl of each image, (B) twice: images (B, C, H, W) in [0, 1], their classes (B), noise (B, Z)."""
        mean, scale = self.encode(images)
        says = self.decode(mean + scale.exp() * noise)
        nll = self.likelihood.nll(images, says, self.learned).flatten(1).sum(1)
        return nll, divergence(mean, scale, self.prior_mean[labels], self.prior_scale[labels])

    def losses(self, images: Tensor, labels: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """The mean of nll and of kl in bits per dimension; the latter with the bits that say the class."""
        nll, kl = self.nats(images, labels, noise)
        unit = self.config.dimensions * math.log(2)
        return {"nll": nll.mean() / unit, "kl": (kl.mean() + math.log(self.config.classes)) / unit}

    def reconstruct(self, images: Tensor) -> Tensor:
        """What is left of images after the latents, without noise: (B, C, H, W) -> (B, C, H, W)."""
        return self(self.encode(images)[0])

    @classmethod
    def load(cls, directory: str | Path) -> VAE:
        """The model of a checkpoint directory (config.json, model.safetensors), in evaluation mode."""
        config = VAEConfig.from_json(json.loads(Path(directory, "config.json").read_text(encoding="utf-8")))
        model = cls(config)
        model.load_hugging_face(load_file(Path(directory, "model.safetensors")))
        return model.eval()


def divergence(mean: Tensor, scale: Tensor, prior_mean: Tensor, prior_scale: Tensor) -> Tensor:
    """KL of two diagonal Gaussians with logs of deviations `scale`, in nats: (B, Z) four times -> (B)."""
    ratio = 2 * (scale - prior_scale)
    return 0.5 * (ratio.exp() - 1 - ratio + ((mean - prior_mean) * torch.exp(-prior_scale)).square()).sum(1)
