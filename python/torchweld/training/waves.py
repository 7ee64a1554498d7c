"""Recordings of single words from WAV files: one channel at 8,000 samples a second, in the middle of 1.28 s."""

from __future__ import annotations

import math
import wave
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from torchweld.errors import UserError

RATE = 8000  # that of telephones; it keeps what lies below 4 kHz
LENGTH = 10240  # samples
LOUD = 32000  # of the largest sample, in int16
_SILENT = 1e-4  # of the loudest power: 40 dB below it
_STEP = RATE // 100


def read(path: Path) -> NDArray[np.int16]:
    """(LENGTH): the word in a file, as loud as all others; of a longer recording what has the most energy.

    Raises:
        UserError: it is no WAV file of PCM, it is damaged, or there is nothing to hear.
    """
    samples, rate = _samples(path)
    word = _word(resampled(samples, rate)) if samples.any() else samples
    peak = np.abs(word).max(initial=0.0)
    if peak == 0.0:
        raise UserError(f"--data {path}: expected a recording, but got silence; leave it out")
    placed = np.zeros(LENGTH, np.int16)
    before = (LENGTH - len(word)) // 2
    placed[before : before + len(word)] = np.round(word * (LOUD / peak))
    return placed


def _samples(path: Path) -> tuple[NDArray[np.float64], int]:
    """The mean of the channels, in [-1, 1], and the rate."""
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, rate, count = file.getparams()[:4]
            contents = file.readframes(count)
    except OSError as error:
        raise UserError(f"--data {path}: expected a WAV file, but got: {error.strerror or error}") from None
    except (wave.Error, EOFError) as error:
        raise UserError(
            f"--data {path}: expected a WAV file of PCM, 8 to 32 bits, but got: {str(error) or 'an early end'}; "
            f"convert it: ffmpeg -i FILE -c:a pcm_s16le WORD.wav"
        ) from None
    if len(contents) != count * channels * width or rate < 1:
        raise UserError(
            f"--data {path}: expected {count} frames of {channels * width} bytes at 1 Hz or more, as its beginning "
            f"says, but got {len(contents)} bytes at {rate} Hz; the file is damaged"
        )
    return decoded(contents, width).reshape(-1, channels).mean(1), rate


def decoded(contents: bytes, width: int) -> NDArray[np.float64]:
    """PCM of `width` bytes a sample in [-1, 1): that of one byte is unsigned, wider samples are little-endian."""
    raw = np.frombuffer(contents, np.uint8).reshape(-1, width)
    if width == 1:
        return (raw[:, 0].astype(np.float64) - 128) / 128
    upper = np.zeros((len(raw), 4), np.uint8)
    upper[:, 4 - width :] = raw
    return upper.view("<i4")[:, 0] / 2.0**31


def resampled(samples: NDArray[np.float64], rate: int) -> NDArray[np.float64]:
    """At RATE: the spectrum is cut, or goes on with zeros, so that nothing folds back."""
    if rate == RATE:
        return samples
    # As long as a whole number of new samples, else they would stand elsewhere.
    whole = np.pad(samples, (0, -len(samples) % (rate // math.gcd(rate, RATE))))
    count = len(whole) * RATE // rate
    return np.fft.irfft(np.fft.rfft(whole), count) * (count / len(whole))


def _word(samples: NDArray[np.float64]) -> NDArray[np.float64]:
    """Without the silence at both ends, and LENGTH at most."""
    padded = np.pad(samples, (0, -len(samples) % _STEP))
    power = np.square(padded).reshape(-1, _STEP).sum(1)
    heard = np.flatnonzero(power >= power.max() * _SILENT)
    word = padded[heard[0] * _STEP : (heard[-1] + 1) * _STEP]
    if len(word) > LENGTH:
        sums = np.concatenate([[0.0], np.square(word).cumsum()])
        start = int((sums[LENGTH:] - sums[:-LENGTH]).argmax())
        word = word[start : start + LENGTH]
    return word


def write(path: Path, samples: NDArray[np.int16]) -> None:
    """A WAV file of 16 bits, one channel, at RATE."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(samples.astype("<i2").tobytes())
