"""Images from IDX files and folders: what is read, how it is split and varied, and what is refused."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pictures import NAMES, drawn, idx, write_folders, write_idx
from torchweld.errors import UserError
from torchweld.training import images, packages


def test_idx_files_are_read_and_split(home: Path) -> None:
    found = images.read(write_idx(home / "idx"))
    pixels, labels = drawn(300, 0)
    assert found.labels == NAMES and found.shape == (1, 8, 8)
    assert torch.equal(found.test.pixels[:, 0], torch.from_numpy(drawn(60, 1)[0]))
    joined = torch.cat([found.training.pixels, found.validation.pixels])[:, 0]
    where = {row.tobytes(): i for i, row in enumerate(pixels)}
    order = [where[row.tobytes()] for row in joined.numpy()]
    assert sorted(order) == list(range(300)) and 1 <= len(found.validation) <= 30
    assert torch.cat([found.training.labels, found.validation.labels]).tolist() == labels[order].tolist()
    assert images.read(home / "idx").digest == found.digest
    (home / "idx/labels.txt").unlink()
    again = images.read(home / "idx")
    assert again.labels == ("0", "1") and again.digest != found.digest


@pytest.mark.parametrize("mode, channels", [("L", 1), ("RGB", 3), ("P", 3)])
def test_folders_are_read_and_split(home: Path, mode: str, channels: int) -> None:
    found = images.read(write_folders(home / "folders", mode=mode))
    assert found.labels == NAMES and found.shape == (channels, 8, 8)
    sizes = [len(part) for part in (found.training, found.validation, found.test)]
    assert sum(sizes) == 120 and min(sizes[1:]) >= 3
    pixels, labels = drawn(120, 0)
    where = {row.tobytes(): label for row, label in zip(pixels, labels, strict=True)}
    for image, label in zip(found.test.pixels, found.test.labels, strict=True):
        assert where[image[0].numpy().tobytes()] == label
    # One that comes twice is in one part alone, and a file more moves no other.
    shutil.copy(sorted((home / "folders/bar").iterdir())[0], home / "folders/bar/again.png")
    more = images.read(home / "folders")
    rows = [set(map(bytes, part.pixels.flatten(1).numpy())) for part in (more.training, more.validation, more.test)]
    assert not rows[0] & rows[1] and not rows[0] & rows[2]
    assert rows[2] >= set(map(bytes, found.test.pixels.flatten(1).numpy()))


def test_a_test_folder_is_the_test(home: Path) -> None:
    write_folders(home / "both/train")
    write_folders(home / "both/test", 20)
    assert len(images.read(home / "both").test) == 20


def test_images_are_shifted_and_flipped() -> None:
    x = torch.arange(1, 101, dtype=torch.uint8).view(1, 1, 10, 10).repeat(200, 1, 1, 1)
    varied = images.Augmentation(2, True)(x, np.random.default_rng(0))
    seen = set()
    for image in varied[:, 0]:
        for flipped in (False, True):
            upright = image.flip(-1) if flipped else image
            for dy in range(-2, 3):
                for dx in range(-2, 3):
                    moved = torch.zeros(14, 14, dtype=torch.uint8)
                    moved[2 + dy : 12 + dy, 2 + dx : 12 + dx] = x[0, 0]
                    if torch.equal(upright, moved[2:12, 2:12]):
                        seen.add((flipped, dy, dx))
                        break
    assert len(seen) > 40
    assert torch.equal(images.Augmentation()(x, np.random.default_rng(0)), x)


def test_black_and_white(home: Path) -> None:
    found = images.read(write_idx(home / "idx"))
    plain = images.black_and_white(found)
    for part, before in ((plain.training, found.training), (plain.test, found.test)):
        assert torch.equal(part.pixels, torch.where(before.pixels >= 128, 255, 0).to(torch.uint8))


def _cut(folder: Path) -> None:
    path = folder / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])


def _swap(folder: Path) -> None:
    shutil.copy(folder / "train-labels-idx1-ubyte", folder / "train-images-idx3-ubyte")


def _short(folder: Path) -> None:
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])


def _fewer_labels(folder: Path) -> None:
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(drawn(299, 0)[1]))


def _other_size(folder: Path) -> None:
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(drawn(60, 1, 12)[0])))


def _no_labels(folder: Path) -> None:
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()


def _test_alone(folder: Path) -> None:
    (folder / "train-images-idx3-ubyte").unlink()


def _one_name(folder: Path) -> None:
    (folder / "labels.txt").write_text("bar")


@pytest.mark.parametrize(
    "damage, message",
    [
        (_cut, r"t10k-images-idx3-ubyte.gz: expected a whole file, but got: .*; download it again"),
        (_swap, r"3 dimension\(s\), which begins with 00000803, but got 00000801"),
        (_short, "expected 300 x 8 x 8 bytes, as its beginning says, but got 19199; download"),
        (_fewer_labels, "expected 300 labels, one an image, but got 299"),
        (_other_size, r"expected images of 8 x 8, as for training, but got 12 x 12"),
        (_no_labels, "expected t10k-labels-idx1-ubyte beside the images, but it is missing"),
        (_test_alone, "expected train-images-idx3-ubyte, but got images for the test alone"),
        (_one_name, "labels.txt: expected the names of 2 classes, a line each, but got 1"),
    ],
)
def test_damaged_idx_files_are_refused(home: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(write_idx(home / "idx"))
    with pytest.raises(UserError, match=message):
        images.read(home / "idx")


def _larger(folder: Path) -> None:
    Image.new("L", (9, 8)).save(folder / "square/999.png")


def _no_image(folder: Path) -> None:
    (folder / "square/999.png").write_text("no image")


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _few(folder: Path) -> None:
    for path in sorted(folder.glob("*/*.png"))[2:]:
        path.unlink()


@pytest.mark.parametrize(
    "damage, message",
    [
        (_larger, "999.png: expected 8 x 8 pixels, as the images before, but got 9 x 8; bring all to one size"),
        (_no_image, "999.png: expected an image, but got"),
        (_empty, "expected IDX files .* or images in a folder for each class, but got neither"),
        (_few, "expected images for training, validation and test, but got"),
        (shutil.rmtree, "expected a folder of IDX files .*, but got no such folder"),
    ],
)
def test_unfit_folders_are_refused(home: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(write_folders(home / "folders"))
    with pytest.raises(UserError, match=message):
        images.read(home / "folders")


def test_images_that_are_not_here_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = replace(packages.PACKAGES["fashion-mnist"], place="")
    monkeypatch.setitem(packages.PACKAGES, "fashion-mnist", nowhere)
    with pytest.raises(UserError, match="get it with `torchweld data get fashion-mnist`"):
        images.load(None)
