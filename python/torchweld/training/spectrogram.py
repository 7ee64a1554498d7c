"""Log-mel spectrograms of words: frames of 10 ms, 48 bands up to 4 kHz; what the model sees of them, and varied.

The scale is mel = 2595 log10(1 + f / 700) (O'Shaughnessy, Speech Communication, 1987), the bands are triangles on it,
each from the middle of the band below to that of the band above, as in the HTK Book, section 5.4.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from torchweld.training.waves import LENGTH, LOUD, RATE

BANDS = 48
HOP = 80
FRAMES = LENGTH // HOP
SPAN = 200  # samples that a frame sees
POINTS = 256  # of its Fourier transform
SEEN = 64  # frames that each word is brought to, as its speed says little
DECIBELS = 60.0  # below the loudest all is silence
SPREAD = 20.0  # decibels that are 1 for the model
NOISE = (20.0, 50.0)  # decibels below the loudest sample
JITTER = 4.0  # frames
WARP = 0.1  # of the frequency
MASKED = (12, 6)  # frames and bands at most


def mel(hertz: Tensor) -> Tensor:
    """Frequencies on the mel scale."""
    return 2595 * torch.log10(1 + hertz / 700)


@cache
def filters() -> Tensor:
    """What each frequency adds to each band: (POINTS / 2 + 1, BANDS)."""
    places = mel(torch.linspace(0, RATE / 2, POINTS // 2 + 1, dtype=torch.float64))
    between = mel(torch.tensor(RATE / 2, dtype=torch.float64)) / (BANDS + 1)
    middles = between * torch.arange(1, BANDS + 1)
    return (1 - (places[:, None] - middles).abs() / between).clamp_min(0).float()


def log_mel(waves: Tensor) -> Tensor:
    """(B, LENGTH) -> decibels (B, FRAMES, BANDS), 0 the loudest and -DECIBELS the least."""
    side = (SPAN - HOP) // 2
    frames = pad(waves.float(), (side, side)).unfold(-1, SPAN, HOP) * torch.hann_window(SPAN)
    power = torch.fft.rfft(frames, POINTS).abs().square() @ filters()
    decibels = 10 * torch.log10(power.clamp_min(1e-10))
    return (decibels - decibels.amax((1, 2), keepdim=True)).clamp_min(-DECIBELS)


def ends(waves: Tensor) -> Tensor:
    """The first frame of each word and the one behind its last: (B, 2)."""
    heard = waves.unflatten(-1, (FRAMES, HOP)).ne(0).any(-1)
    last = FRAMES - heard.flip(-1).int().argmax(-1)
    return torch.stack([heard.int().argmax(-1), last], -1).double()


def features(decibels: Tensor, ends: Tensor) -> Tensor:
    """What the model sees: (B, SEEN, BANDS) between the ends, less the mean of each band, which microphones change."""
    steps = (torch.arange(SEEN) + 0.5) / SEEN
    at = (ends[:, :1] + (ends[:, 1:] - ends[:, :1]) * steps - 0.5).clamp(0, FRAMES - 1)
    below = at.long().clamp_max(FRAMES - 2)
    rows = torch.arange(len(at))[:, None]
    seen = torch.lerp(decibels[rows, below], decibels[rows, below + 1], (at - below)[..., None].float())
    return (seen - seen.mean(1, keepdim=True)) / SPREAD


def warped(decibels: Tensor, factors: Tensor) -> Tensor:
    """Band b of (B, FRAMES, BANDS) from the place b * factor: a throat of another length."""
    at = (torch.arange(BANDS) * factors).clamp(0, BANDS - 1)
    below = at.long().clamp_max(BANDS - 2)
    lower, upper = (decibels.gather(2, (below + i)[:, None].expand(decibels.shape)) for i in (0, 1))
    return torch.lerp(lower, upper, (at - below)[:, None].float())


def of(waves: Tensor) -> Tensor:
    """The features of words (B, LENGTH)."""
    return features(log_mel(waves), ends(waves))


def varied(waves: Tensor, rng: np.random.Generator) -> Tensor:
    """The features of words as others might say them elsewhere.

    Each has noise; its ends are moved, and with them its speed; its spectrum is stretched, as vocal tracts differ in
    length (Jaitly and Hinton, 2013); some frames and bands have the mean (SpecAugment: Park et al., arXiv:1904.08779).
    """
    count = len(waves)
    level = LOUD * 10 ** (-rng.uniform(*NOISE, (count, 1)) / 20)
    noise = torch.from_numpy(rng.standard_normal(waves.shape, np.float32) * level.astype(np.float32))
    moved = ends(waves) + torch.from_numpy(rng.uniform(-JITTER, JITTER, (count, 2)))
    factors = torch.from_numpy(rng.uniform(1 - WARP, 1 + WARP, (count, 1)))
    seen = features(warped(log_mel(waves + noise), factors), moved)
    for axis, most in enumerate(MASKED, 1):
        size = seen.shape[axis]
        width = rng.integers(0, most + 1, (count, 1))
        start = rng.integers(0, size - most, (count, 1))
        mask = torch.from_numpy((np.arange(size) >= start) & (np.arange(size) < start + width))
        seen = seen.masked_fill(mask.unsqueeze(3 - axis), 0.0)
    return seen
