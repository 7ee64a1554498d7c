"""What images cost without a network, in bits per number: gzip, xz, PNG, WebP, independent pixels; and PCA's errors."""

from __future__ import annotations

import gzip
import io
import lzma
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchweld.errors import UserError
from torchweld.training.images import Images, Pictures, pillow

FORMATS: Mapping[str, Mapping[str, Any]] = {
    "PNG": {"optimize": True},
    "WebP": {"lossless": True, "method": 6, "quality": 100},
}
ALONE = 1000  # images that are coded one by one


def bits(pictures: Pictures, levels: int) -> dict[str, float]:
    """Bits per number of the test, by the name of the coder; those of Pillow where it is installed."""
    test = pictures.test
    packed = _packed(test.pixels, levels)
    found = {
        "independent pixels": independent(pictures.training, test, levels),
        "gzip, all images in one file": _rate(len(gzip.compress(packed, 9)), test.pixels),
        "xz, all images in one file": _rate(len(lzma.compress(packed, preset=9)), test.pixels),
    }
    with suppress(UserError, KeyError):  # without Pillow, or a Pillow without WebP
        for name, options in FORMATS.items():
            found[f"{name}, image by image"] = _alone(test.pixels[:ALONE], levels, name, options)
    return found


def independent(training: Images, test: Images, levels: int) -> float:
    """The mean cost of a number whose place alone is known: by the frequencies in training, each level plus one."""
    counts = [_frequencies(flat, levels) for flat in training.pixels.flatten(1).t()]
    costs = torch.stack([-(c / c.sum()).log2() for c in counts])  # (D, levels)
    return float(costs.gather(1, _levels(test.pixels, levels).flatten(1).t()).mean())


def _frequencies(column: Tensor, levels: int) -> Tensor:
    return torch.bincount(_levels(column, levels), minlength=levels).double() + 1


def _levels(pixels: Tensor, levels: int) -> Tensor:
    return pixels.long() * (levels - 1) // 255


def _packed(pixels: Tensor, levels: int) -> bytes:
    array = pixels.numpy()
    return (np.packbits(array > 0) if levels == 2 else array).tobytes()


def _rate(size: int, pixels: Tensor) -> float:
    return 8 * size / pixels.numel()


def _alone(pixels: Tensor, levels: int, name: str, options: Mapping[str, Any]) -> float:
    image = pillow(f"the size of {name}")
    size = 0
    for array in pixels.permute(0, 2, 3, 1).numpy():
        buffer = io.BytesIO()
        picture = image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array)
        (picture.convert("1") if levels == 2 and name == "PNG" else picture).save(buffer, name, **options)
        size += buffer.tell()
    return _rate(size, pixels)


def principal_components(training: Images, count: int) -> Callable[[Tensor], Tensor]:
    """What is left of numbers in [0, 1], (N, C, H, W), after the projection on as many principal components."""
    x = training.pixels.flatten(1).float() / 255
    mean = x.mean(0)
    covariance = (x.t() @ x) / len(x) - mean[:, None] * mean
    basis = torch.linalg.eigh(covariance.double()).eigenvectors[:, -min(count, math.prod(x.shape[1:])) :].float()

    def project(images: Tensor) -> Tensor:
        centred = images.flatten(1) - mean
        return (centred @ basis @ basis.t() + mean).view_as(images)

    return project
