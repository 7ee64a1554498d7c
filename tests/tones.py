"""Words that are made on the spot: tones one after another, which rise or fall, by voices of several pitches."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

WORDS = {"fall": (1.0, 0.5), "rise": (0.5, 1.0), "wave": (1.0, 0.5, 1.0)}


def said(word: str, pitch: float, rng: np.random.Generator, rate: int = 8000) -> NDArray[np.float64]:
    """The word, with silence around it."""
    parts = [np.sin(2 * np.pi * 2 * pitch * part * np.arange(rate // 5) / rate) for part in WORDS[word]]
    edges = [np.zeros(int(rate * rng.uniform(0.05, 0.2))) for _ in range(2)]
    return np.concatenate([edges[0], *parts, edges[1]]) * 0.5


def write(path: Path, samples: NDArray[np.float64], rate: int = 8000, width: int = 2, channels: int = 1) -> Path:
    """A WAV file of PCM; each channel has the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = np.round(samples * (2.0 ** (8 * width - 1) - 1)).astype("<i4")
    raw = (whole + 128 if width == 1 else whole).view(np.uint8).reshape(-1, 4)[:, :width]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(np.repeat(raw[:, None], channels, axis=1).tobytes())
    return path


def write_words(folder: Path, speakers: int = 20, takes: int = 2) -> Path:
    """WORD/SPEAKER_TAKE.wav."""
    rng = np.random.default_rng(0)
    for speaker in range(speakers):
        pitch = rng.uniform(450, 550)
        for word in WORDS:
            for take in range(takes):
                write(folder / word / f"s{speaker}_{take}.wav", said(word, pitch, rng))
    return folder
