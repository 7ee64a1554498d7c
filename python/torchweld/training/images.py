"""Images with classes from files: IDX, or a folder for each class; their split, and how they are varied."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchweld.errors import UserError
from torchweld.training import idx, packages
from torchweld.training.extras import needed
from torchweld.training.settings import Settings

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".pgm", ".ppm", ".tif", ".tiff"}
_FASHION_LABELS = "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7"  # sha256 of those for training
FASHION = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


@dataclass(frozen=True)
class Images:
    """pixels: (N, C, H, W) of uint8; labels: (N) of int64, numbers of classes."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, indices: Sequence[int] | Tensor) -> Images:
        """Those of `indices`."""
        return Images(self.pixels[indices], self.labels[indices])


@dataclass(frozen=True)
class Pictures:
    """Images for a program. `labels`: the names of the classes; files: as in `Data`."""

    labels: tuple[str, ...]
    training: Images
    validation: Images
    test: Images
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """As in `Data`."""
        found = hashlib.sha256("\0".join(self.labels).encode())
        for part in (self.training, self.validation, self.test):
            for tensor in (part.pixels, part.labels):
                found.update(tensor.contiguous().numpy().data)
        return found.hexdigest()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        c, h, w = self.training.pixels.shape[1:]
        return c, h, w


def load(data: list[str] | None, most: int | None = None) -> Pictures:
    """The images of the folder that --data names; without one Fashion-MNIST's, if it is here.

    Args:
        most: so many of them for training, each class in turn.

    Raises:
        UserError: they cannot be read, or are not here, or `most` leaves a class out.
    """
    if data is not None and len(data) != 1:
        raise UserError(f"--data: expected one folder of images, but got {len(data)} names")
    pictures = read(packages.find("fashion-mnist") if data is None else Path(data[0]))
    if most is None:
        return pictures
    if most < len(pictures.labels):
        raise UserError(
            f"--max-samples: expected at least {len(pictures.labels)}, an image of each class, but got {most}"
        )
    return replace(pictures, training=pictures.training.part(in_turn(pictures.training.labels)[:most]))


def in_turn(labels: Tensor) -> Tensor:
    """The order in which the first image of each class comes first, then the second of each: folders go by class."""
    places = torch.empty_like(labels)
    for label in labels.unique():
        own = labels == label
        places[own] = torch.arange(int(own.sum()))
    return torch.argsort(places, stable=True)


def describe(pictures: Pictures, settings: Settings) -> str:
    """What is learned from."""
    source = settings.data[0] if settings.data else packages.find("fashion-mnist")
    sizes = " / ".join(f"{len(part):,}" for part in (pictures.training, pictures.validation, pictures.test))
    channels, height, width = pictures.shape
    what = f"{height} x {width}{' in colour' if channels > 1 else ''}, {len(pictures.labels)} classes"
    return f"images: {source}, {sizes} for training, validation and test, {what}"


def read(folder: Path) -> Pictures:
    """The images of a folder: IDX files, or a folder of images for each class, or within `train` and `test`.

    A hash of an image decides where it belongs: validation is 1 of 32 images for training. Where there is no test,
    validation and test are a tenth each.

    Raises:
        UserError: they cannot be read, differ in size, or there are too few.
    """
    if not folder.is_dir():
        raise UserError(
            f"--data {folder}: expected a folder of IDX files or of a folder of images for each class, but got "
            f"{'a file' if folder.exists() else 'no such folder'}"
        )
    found = idx.files(folder)
    parts, labels = _read_idx(folder, found) if found else _read_folders(folder)
    test = parts.get("test")
    draws = _draws(parts["train"])
    if test is None:
        rest = [torch.from_numpy(np.flatnonzero(draws % 10 == n)) for n in (0, 1)]
        training = torch.from_numpy(np.flatnonzero(draws % 10 > 1))
        validation, test = (parts["train"].part(indices) for indices in rest)
    else:
        training = torch.from_numpy(np.flatnonzero(draws % 32 > 0))
        validation = parts["train"].part(torch.from_numpy(np.flatnonzero(draws % 32 == 0)))
    pictures = Pictures(labels, parts["train"].part(training), validation, test)
    sizes = [len(part) for part in (pictures.training, pictures.validation, pictures.test)]
    if not all(sizes):
        raise UserError(
            f"--data {folder}: expected images for training, validation and test, but got "
            f"{' / '.join(map(str, sizes))} (a hash of the image decides); give more of them"
        )
    return pictures


def _draws(images: Images) -> NDArray[np.int64]:
    """A number for each image that depends on its pixels alone."""
    rows = images.pixels.numpy().reshape(len(images), -1)
    hashes = (hashlib.blake2b(row.data, digest_size=7).digest() for row in rows)
    return np.array([int.from_bytes(digest, "big") for digest in hashes], dtype=np.int64)


# ---- IDX


def _read_idx(folder: Path, found: dict[str, tuple[Path, Path]]) -> tuple[dict[str, Images], tuple[str, ...]]:
    parts: dict[str, Images] = {}
    size, most = (0, 0), 0
    for part, (of_images, of_labels) in found.items():
        pixels, labels = idx.read(of_images, 3), idx.read(of_labels, 1)
        if len(pixels) != len(labels):
            raise UserError(f"--data {of_labels}: expected {len(pixels)} labels, one an image, but got {len(labels)}")
        if parts and size != pixels.shape[1:]:
            raise UserError(
                f"--data {of_images}: expected images of {size[0]} x {size[1]}, as for training, but got "
                f"{pixels.shape[1]} x {pixels.shape[2]}"
            )
        size, most = pixels.shape[1:], max(most, int(labels.max(initial=0)))
        tensors = torch.from_numpy(pixels[:, None].copy()), torch.from_numpy(labels.astype(np.int64))
        parts[part] = Images(*tensors)
    return parts, _label_names(folder, parts["train"].labels, most + 1)


def _label_names(folder: Path, labels: Tensor, count: int) -> tuple[str, ...]:
    """From labels.txt, a line each; those of a known data set; else numbers."""
    path = folder / "labels.txt"
    if path.is_file():
        names = tuple(path.read_text(encoding="utf-8").splitlines())
        if len(names) != count or not all(names):
            raise UserError(f"--data {path}: expected the names of {count} classes, a line each, but got {len(names)}")
        return names
    digest = hashlib.sha256(labels.numpy().astype(np.uint8).data).hexdigest()
    return FASHION if digest == _FASHION_LABELS else tuple(map(str, range(count)))


# ---- Folders


def pillow(purpose: str) -> ModuleType:
    """PIL.Image.

    Raises:
        UserError: Pillow, an optional extra, is not installed.
    """
    return needed("PIL.Image", "Pillow", "images", purpose)


def _read_folders(folder: Path) -> tuple[dict[str, Images], tuple[str, ...]]:
    roots = {part: folder / name for name, part in (("train", "train"), ("test", "test")) if (folder / name).is_dir()}
    roots = roots if "train" in roots else {"train": folder}
    files = {part: _class_files(root) for part, root in roots.items()}
    labels = tuple(sorted(files["train"]))
    if not labels:
        raise UserError(
            f"--data {folder}: expected IDX files (train-images-idx3-ubyte.gz and so on) or images in a folder for "
            f"each class, but got neither"
        )
    parts, size = {}, None
    coloured = False
    read = {}
    for part, classes in files.items():
        if unknown := sorted(set(classes) - set(labels)):
            raise UserError(f"--data {roots[part]}: expected the classes of training, but got {unknown[0]!r}")
        read[part] = [(_open(path), labels.index(name)) for name, paths in sorted(classes.items()) for path in paths]
        coloured |= any(image.mode not in ("1", "L") for image, _ in read[part])
    for part, images in read.items():
        arrays = []
        for image, _ in images:
            size = size or image.size
            if image.size != size:
                raise UserError(
                    f"--data {image.filename}: expected {size[0]} x {size[1]} pixels, as the images before, but got "
                    f"{image.size[0]} x {image.size[1]}; bring all to one size"
                )
            array = np.asarray(image.convert("RGB" if coloured else "L"))
            arrays.append(array.transpose(2, 0, 1) if coloured else array[None])
        numbers = torch.tensor([label for _, label in images])
        parts[part] = Images(torch.from_numpy(np.stack(arrays)), numbers)
    return parts, labels


def _class_files(root: Path) -> dict[str, list[Path]]:
    """The images of each class; without folders those in `root`, of one class without a name."""
    found = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        if paths := _image_files(folder):
            found[folder.name] = paths
    return found or ({"": paths} if (paths := _image_files(root)) else {})


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def open_as(path: Path, channels: int, size: int) -> Tensor:
    """An image of any size and colour as (channels, size, size) of uint8.

    Raises:
        UserError: it cannot be read.
    """
    if channels not in (1, 3):
        raise UserError(f"config.json: num_channels: expected 1 or 3 for files of images, but got {channels}")
    image = _open(path).convert("L" if channels == 1 else "RGB")
    array = np.array(image if image.size == (size, size) else image.resize((size, size)))
    return torch.from_numpy(array.reshape(size, size, channels)).permute(2, 0, 1)


def _open(path: Path) -> Any:
    try:
        image = pillow(f"--data {path}").open(path)
        image.load()
    except OSError as error:
        raise UserError(f"--data {path}: expected an image, but got: {error.strerror or error}") from None
    return image


# ---- Batches


@dataclass(frozen=True)
class Augmentation:
    """How training images are varied. `shift`: up to so many pixels each way; `flip`: half of them, left to right."""

    shift: int = 0
    flip: bool = False

    @classmethod
    def of(cls, options: Mapping[str, str]) -> Augmentation:
        """From a program's options.

        Raises:
            UserError: one of them has no meaning.
        """
        shift, flip = options["shift"], options["flip"]
        if not shift.isdecimal() or int(shift) > 1000:
            raise UserError(f"--shift: expected a number of pixels, but got {shift!r}")
        return cls(int(shift), flip == "yes")

    def __call__(self, pixels: Tensor, rng: np.random.Generator) -> Tensor:
        """(B, C, H, W) -> the same; what comes in from the edges is black."""
        if self.flip:
            flipped = torch.from_numpy(rng.random(len(pixels)) < 0.5)
            pixels = torch.where(flipped[:, None, None, None], pixels.flip(-1), pixels)
        if self.shift:
            n, (h, w) = self.shift, pixels.shape[-2:]
            padded = torch.nn.functional.pad(pixels, (n, n, n, n))
            moves = rng.integers(0, 2 * n + 1, (len(pixels), 2)).tolist()
            pixels = torch.stack([image[:, y : y + h, x : x + w] for image, (y, x) in zip(padded, moves, strict=True)])
        return pixels


def black_and_white(pictures: Pictures) -> Pictures:
    """Each pixel 0 or 255, by its upper bit."""
    parts = {name: getattr(pictures, name) for name in ("training", "validation", "test")}
    return replace(pictures, **{name: replace(part, pixels=(part.pixels >> 7) * 255) for name, part in parts.items()})
