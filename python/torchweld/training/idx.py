"""IDX, the format of MNIST (yann.lecun.com/exdb/mnist).

Two zero bytes, the type, the number of dimensions, each of them in four bytes, the data.
"""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from torchweld.errors import UserError

_BYTES = 8  # IDX's number of the type
_PARTS = (("train", "train"), ("t10k", "test"), ("test", "test"))


def files(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Images and labels of each part that is there."""
    found = {}
    for prefix, part in _PARTS:
        pair = [_either(folder / f"{prefix}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")]
        if pair[0] is None:
            continue
        if pair[1] is None:
            raise UserError(
                f"--data {folder}: expected {prefix}-labels-idx1-ubyte beside the images, but it is missing"
            )
        found[part] = (pair[0], pair[1])
    if found and "train" not in found:
        raise UserError(f"--data {folder}: expected train-images-idx3-ubyte, but got images for the test alone")
    return found


def _either(path: Path) -> Path | None:
    """The file, or the same with .gz; None if there is neither."""
    return next((p for p in (path, path.with_name(f"{path.name}.gz")) if p.is_file()), None)


def read(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The array of bytes in an IDX file, which may be compressed by gzip.

    Raises:
        UserError: it is damaged, or of other dimensions.
    """
    try:
        contents = path.read_bytes()
        if path.suffix == ".gz":
            contents = gzip.decompress(contents)
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--data {path}: expected a whole file, but got: {reason}; download it again") from None
    magic = bytes([0, 0, _BYTES, dimensions])
    if contents[:4] != magic:
        raise UserError(
            f"--data {path}: expected an IDX file of bytes with {dimensions} dimension(s), which begins with "
            f"{magic.hex()}, but got {contents[:4].hex() or 'nothing'}"
        )
    start = 4 + 4 * dimensions
    shape = [int.from_bytes(contents[at : at + 4], "big") for at in range(4, start, 4)]
    got = len(contents) - start
    if got != math.prod(shape):
        raise UserError(
            f"--data {path}: expected {' x '.join(map(str, shape))} bytes, as its beginning says, but got {got}; "
            f"download it again"
        )
    return np.frombuffer(contents, np.uint8, offset=start).reshape(shape)
