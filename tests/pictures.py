"""Images that are made on the spot: squares and bars in noise, as IDX files or as folders of PNG."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

NAMES = ("bar", "square")


def drawn(count: int, seed: int, size: int = 8) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """(count, size, size) and labels: a bright bar, or a square in a corner, over a little noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count).astype(np.uint8)
    pixels = rng.integers(0, 30, (count, size, size)).astype(np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        at = rng.integers(0, size - 3)
        if label:
            image[at : at + 3, at : at + 3] += 200
        else:
            image[at] += 200
    return pixels, labels


def idx(array: NDArray[np.uint8]) -> bytes:
    """The contents of an IDX file."""
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.tobytes()


def write_idx(folder: Path, count: int = 300, test: int = 60, size: int = 8) -> Path:
    """Four IDX files, those for the test compressed."""
    folder.mkdir(exist_ok=True)
    for prefix, n, seed in (("train", count, 0), ("t10k", test, 1)):
        for kind, array in zip(("images-idx3", "labels-idx1"), drawn(n, seed, size), strict=True):
            contents, name = idx(array), f"{prefix}-{kind}-ubyte"
            if prefix == "t10k":
                contents, name = gzip.compress(contents), f"{name}.gz"
            (folder / name).write_bytes(contents)
    (folder / "labels.txt").write_text("\n".join(NAMES) + "\n")
    return folder


def write_folders(folder: Path, count: int = 120, mode: str = "L") -> Path:
    """A folder of PNG for each class."""
    pixels, labels = drawn(count, 0)
    for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        place = folder / NAMES[label] / f"{i:03d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).convert(mode).save(place)
    return folder
