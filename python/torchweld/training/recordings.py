"""Recordings of spoken words from folders of WAV files, and their split: a speaker is in one part only."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torchweld.errors import UserError
from torchweld.training import voices, waves
from torchweld.training.images import in_turn

_OTHERS = {".mp3", ".ogg", ".oga", ".opus", ".flac", ".m4a", ".aac", ".wma", ".aif", ".aiff"}
_LAYOUT = "WORD/SPEAKER_1.wav or WORD_SPEAKER_1.wav"


@dataclass(frozen=True)
class Recordings:
    """waves: (N, LENGTH) of int16; labels: (N) of int64, numbers of words; names: of the files."""

    waves: Tensor
    labels: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, indices: Sequence[int] | Tensor) -> Recordings:
        """Those of `indices`."""
        names = tuple(self.names[int(i)] for i in indices)
        return Recordings(self.waves[indices], self.labels[indices], names)


@dataclass(frozen=True)
class Spoken:
    """Recordings for the program. `labels`: the words; `speakers`: how many there are; files: as in `Data`."""

    labels: tuple[str, ...]
    training: Recordings
    validation: Recordings
    test: Recordings
    speakers: tuple[int, int, int]
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """As in `Data`."""
        found = hashlib.sha256("\0".join(self.labels).encode())
        for part in (self.training, self.validation, self.test):
            found.update(part.waves.contiguous().numpy().data)
            found.update(part.labels.contiguous().numpy().data)
        return found.hexdigest()


@dataclass(frozen=True)
class File:
    """A recording before it is read."""

    path: Path
    word: str
    speaker: str


def load(data: list[str] | None, most: int | None = None) -> Spoken:
    """The recordings of the folder that --data names; without one those of `voices`.

    Args:
        most: so many of them for training, each word in turn.

    Raises:
        UserError: they cannot be read, or are not here, or `most` leaves a word out.
    """
    if data is not None and len(data) != 1:
        raise UserError(f"--data: expected one folder of recordings, but got {len(data)} names")
    spoken = read(voices.folder() if data is None else Path(data[0]))
    if most is None:
        return spoken
    if most < len(spoken.labels):
        raise UserError(
            f"--max-samples: expected at least {len(spoken.labels)}, a recording of each word, but got {most}"
        )
    return replace(spoken, training=spoken.training.part(in_turn(spoken.training.labels)[:most]))


def read(folder: Path) -> Spoken:
    """The recordings of a folder, or of `train` and `test` within it: WORD/SPEAKER_1.wav or WORD_SPEAKER_1.wav.

    A tenth of the speakers each is for validation and, where there is no `test`, for the test; a hash decides which.

    Raises:
        UserError: they cannot be read, or there are too few words or speakers.
    """
    if not folder.is_dir():
        got = "a file" if folder.exists() else "no such folder"
        raise UserError(f"--data {folder}: expected a folder of recordings ({_LAYOUT}), but got {got}")
    test = _files(folder / "test") if (folder / "train").is_dir() and (folder / "test").is_dir() else []
    files = _files(folder / "train" if (folder / "train").is_dir() else folder)
    labels = tuple(sorted({file.word for file in files}))
    if len(labels) < 2:
        raise UserError(
            f"--data {folder}: expected recordings of 2 or more words ({_LAYOUT}), but got {len(labels)}; a folder for "
            f"each word, or the word in front of the file's name"
        )
    speakers = _shuffled({file.speaker for file in files})
    some = max(1, round(len(speakers) / 10))
    parts = [speakers[some:], speakers[:some]]
    if not test:
        parts = [speakers[2 * some :], speakers[:some], speakers[some : 2 * some]]
    if not parts[0]:
        raise UserError(
            f"--data {folder}: expected recordings of {len(parts)} or more speakers, for "
            f"{'training and validation' if test else 'training, validation and test'}, but got {len(speakers)}; name "
            f"the files {_LAYOUT}: a speaker is in one part only, else the test says little of others"
        )
    chosen = [[file for file in files if file.speaker in set(part)] for part in parts]
    if test:
        chosen, parts = [*chosen, test], [*parts, sorted({file.speaker for file in test})]
    if lacking := sorted({file.word for part in chosen for file in part} - {file.word for file in chosen[0]}):
        raise UserError(
            f"--data {folder}: expected recordings of each word for training, but got none of {lacking[0]!r}; give more"
        )
    training, validation, tested = (_opened(part, labels) for part in chosen)
    return Spoken(labels, training, validation, tested, (len(parts[0]), len(parts[1]), len(parts[2])))


def _shuffled(speakers: set[str]) -> list[str]:
    """In an order that depends on the names alone, and not on the alphabet."""
    return sorted(speakers, key=lambda name: hashlib.blake2b(name.encode(), digest_size=8).digest())


def _files(root: Path) -> list[File]:
    """The recordings in folders by word, or those whose names begin with the word."""
    found = [
        File(path, folder.name, path.stem.partition("_")[0])
        for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith((".", "_")))
        for path in _wav(folder)
    ]
    if not found:
        for path in _wav(root):
            word, *rest = path.stem.split("_")
            found.append(File(path, word, rest[0] if rest else ""))
    if not found:
        raise UserError(f"--data {root}: expected recordings ({_LAYOUT}), but got a folder without .wav files")
    return found


def _wav(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    if wrong := [path for path in paths if path.suffix.lower() in _OTHERS]:
        raise UserError(
            f"--data {wrong[0]}: expected .wav files of PCM, but got {wrong[0].suffix}; convert it: ffmpeg -i FILE "
            f"-c:a pcm_s16le WORD.wav"
        )
    return [path for path in paths if path.suffix.lower() == ".wav"]


def _opened(files: Sequence[File], labels: Sequence[str]) -> Recordings:
    read = torch.from_numpy(np.stack([waves.read(file.path) for file in files]))
    numbers = torch.tensor([labels.index(file.word) for file in files])
    return Recordings(read, numbers, tuple(f"{file.path.parent.name}/{file.path.name}" for file in files))
