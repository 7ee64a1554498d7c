"""Words from WAV files: what is read, how they are split, their spectrograms, and time warping, against float64."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from tones import WORDS, said, write, write_words
from torchweld.errors import UserError
from torchweld.training import recordings, voices, warping, waves
from torchweld.training import spectrogram as spectra


@pytest.mark.parametrize("rate", [6000, 8000, 11025, 22050, 44100])
@pytest.mark.parametrize("width, channels", [(1, 1), (2, 2), (3, 1), (4, 3)])
def test_every_kind_of_pcm_gives_the_same_word(home: Path, rate: int, width: int, channels: int) -> None:
    def tone(rate: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        seconds = np.arange(rate // 2) / rate
        envelope = np.sin(np.pi * 2 * seconds) ** 2
        return 0.6 * envelope * (np.sin(2 * np.pi * 440 * seconds) + 0.3 * np.sin(2 * np.pi * 1900 * seconds))

    expected = tone(8000)
    found = waves.read(write(home / "a.wav", tone(rate), rate, width, channels)).astype(np.float64)
    start = (waves.LENGTH - len(expected)) // 2 + 500
    middle = expected[500:3500] / np.abs(expected).max()
    best = min(  # silence is cut in steps of 10 ms, and the middle of the word moves with it
        np.abs(found[start + at : start + at + 3000] / waves.LOUD - middle).max() for at in range(-80, 81)
    )
    assert best < (0.03 if width == 1 else 3e-3)
    assert np.abs(found).max() == waves.LOUD


def test_what_lies_above_4_khz_does_not_fold_back() -> None:
    seconds = np.arange(16000) / 16000
    assert np.abs(waves.resampled(np.sin(2 * np.pi * 5000 * seconds), 16000)).max() < 1e-9


def test_of_a_long_recording_the_loudest_part_is_read(home: Path) -> None:
    samples = np.random.default_rng(0).normal(0, 0.02, 40000)
    word = 0.5 * np.sin(np.arange(4000))
    samples[21000:25000] += word
    found = waves.read(write(home / "a.wav", samples))
    assert np.abs(found).max() == waves.LOUD
    assert max(np.corrcoef(found[i : i + 4000], word)[0, 1] for i in range(waves.LENGTH - 4000)) > 0.99


def test_what_is_no_recording_is_refused(home: Path) -> None:
    good = write(home / "good.wav", said("rise", 500, np.random.default_rng(0))).read_bytes()
    floating = good[:20] + struct.pack("<H", 3) + good[22:]
    cases = {
        "text.wav": (b"no sound", "expected a WAV file of PCM, 8 to 32 bits, but got: "),
        "float.wav": (floating, "unknown format: 3; convert it: ffmpeg -i FILE -c:a pcm_s16le"),
        "half.wav": (good[:-1000], "the file is damaged"),
        "empty.wav": (b"", "an early end"),
        "silent.wav": (good[:44] + bytes(len(good) - 44), "expected a recording, but got silence"),
    }
    for name, (contents, message) in cases.items():
        (home / name).write_bytes(contents)
        with pytest.raises(UserError, match="--data .*" + name) as caught:
            waves.read(home / name)
        assert message in str(caught.value), name
    with pytest.raises(UserError, match="No such file"):
        waves.read(home / "nowhere.wav")


def test_spectrograms_are_those_of_the_definition_in_float64() -> None:
    """Fourier sums written out, and triangles by their corners."""
    rng = np.random.default_rng(0)
    given = rng.integers(-20000, 20000, (2, waves.LENGTH)).astype(np.int16)
    top = 2595 * np.log10(1 + 4000 / 700)
    corners = 700 * (10 ** (np.linspace(0, top, 50) / 2595) - 1)  # hertz
    to_mel = [2595 * np.log10(1 + f / 700) for f in np.arange(129) * 8000 / 256]
    steps = 2595 * np.log10(1 + corners / 700)
    weights = np.array([np.interp(to_mel, steps[b : b + 3], [0, 1, 0]) for b in range(48)])
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(200) / 200)
    waving = np.exp(-2j * np.pi * np.outer(np.arange(129), np.arange(200)) / 256)
    for row, found in zip(given, spectra.log_mel(torch.from_numpy(given)).numpy(), strict=True):
        padded = np.concatenate([np.zeros(60), row.astype(np.float64), np.zeros(60)])
        frames = np.array([padded[80 * t : 80 * t + 200] * window for t in range(128)])
        decibels = 10 * np.log10(np.abs(frames @ waving.T) ** 2 @ weights.T)
        expected = np.maximum(decibels - decibels.max(), -60.0)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3)


def test_the_model_sees_each_word_from_end_to_end_without_the_level_of_a_band(home: Path) -> None:
    given = recordings.read(write_words(home / "words")).training.waves[:5]
    decibels, seen = spectra.log_mel(given).double().numpy(), spectra.of(given)
    assert seen.shape == (5, 64, 48)
    for wave, rows, found in zip(given.numpy(), decibels, seen.numpy(), strict=True):
        heard = np.flatnonzero(np.abs(wave.reshape(-1, 80)).max(1))
        begin, end = heard[0], heard[-1] + 1
        at = begin + (end - begin) * (np.arange(64) + 0.5) / 64 - 0.5
        expected = np.stack([np.interp(at, np.arange(128), band) for band in rows.T], 1)
        np.testing.assert_allclose(found, (expected - expected.mean(0)) / 20, rtol=0, atol=1e-5)


def test_a_spectrum_is_stretched_by_the_factor() -> None:
    given, factors = torch.randn(3, 128, 48), torch.tensor([[0.8], [1.0], [1.2]], dtype=torch.float64)
    found = spectra.warped(given, factors)
    assert torch.equal(found[1], given[1])
    for row, rows, factor in zip(found.numpy(), given.double().numpy(), factors[:, 0].tolist(), strict=True):
        at = np.arange(48) * factor
        expected = np.stack([np.interp(at, np.arange(48), frame) for frame in rows])  # the last band goes on
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-5)


def test_variations_are_those_of_the_seed_and_not_far_off(home: Path) -> None:
    read = recordings.read(write_words(home / "words")).training
    one, again, other = (spectra.varied(read.waves[:9], np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    plain = spectra.of(read.waves[:9])
    for seen in (one, other):
        assert seen.shape == plain.shape and seen.isfinite().all()
        assert (seen == 0).all(1).any() and (seen == 0).all(2).any()  # masks of bands and of frames
        near = [torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] for a, b in zip(seen, plain, strict=True)]
        assert 0.2 < torch.stack(near).mean() < 0.99


def test_time_warping_is_the_best_of_all_ways() -> None:
    rng = np.random.default_rng(0)
    one, others = rng.normal(size=(4, 3)), [rng.normal(size=(n, 3)) for n in (1, 3, 5)]

    def best(a: warping.Floats, b: warping.Floats, i: int, j: int) -> float:
        cost = float(np.linalg.norm(a[i] - b[j]))
        if i == j == 0:
            return 2 * cost
        ways = [2 * cost + best(a, b, i - 1, j - 1)] if i and j else []
        ways += [cost + best(a, b, i - 1, j)] if i else []
        ways += [cost + best(a, b, i, j - 1)] if j else []
        return min(ways)

    expected = [best(one, other, 3, len(other) - 1) / (4 + len(other)) for other in others]
    np.testing.assert_allclose(warping.distances(one, others), expected, rtol=1e-12)


def test_no_speaker_is_in_two_parts(home: Path) -> None:
    read = recordings.read(write_words(home / "words"))
    parts = (read.training, read.validation, read.test)
    speakers = [{name.split("/")[1].split("_")[0] for name in part.names} for part in parts]
    assert not any(a & b for a, b in itertools.combinations(speakers, 2))
    assert tuple(map(len, speakers)) == read.speakers == (16, 2, 2) and read.labels == tuple(WORDS)
    assert all(
        read.labels[n] == name.split("/")[0] for part in parts for n, name in zip(part.labels, part.names, strict=True)
    )


def test_the_same_from_the_names_of_files_alone(home: Path) -> None:
    folder, flat = write_words(home / "words"), home / "flat"
    flat.mkdir()
    for path in folder.glob("*/*.wav"):
        path.rename(flat / f"{path.parent.name}_{path.name}")
    read = recordings.read(flat)
    assert read.labels == tuple(WORDS) and read.speakers == (16, 2, 2) and len(read.training) == 96


def test_a_test_of_its_own(home: Path) -> None:
    folder = home / "words"
    write_words(folder / "train", 5)
    write(folder / "test" / "rise.wav", said("rise", 300, np.random.default_rng(7)))
    read = recordings.read(folder)
    assert read.speakers == (4, 1, 1) and read.test.labels.tolist() == [1]
    write(folder / "test" / "dip.wav", said("rise", 300, np.random.default_rng(8)))
    with pytest.raises(UserError, match="expected recordings of each word for training, but got none of 'dip'"):
        recordings.read(folder)


def test_folders_without_enough_are_refused(home: Path) -> None:
    (home / "none").mkdir()
    write_words(home / "two", 2)
    write_words(home / "mp3", 3)
    (home / "mp3" / "rise" / "a.mp3").write_bytes(b"")
    write(home / "one" / "rise" / "a.wav", said("rise", 500, np.random.default_rng(0)))
    for name, message in (
        (
            "nowhere",
            "expected a folder of recordings (WORD/SPEAKER_1.wav or WORD_SPEAKER_1.wav), but got no such folder",
        ),
        ("none", "but got a folder without .wav files"),
        ("one", "expected recordings of 2 or more words"),
        (
            "two",
            "expected recordings of 3 or more speakers, for training, validation and test, but got 2; name the files",
        ),
        ("mp3", "expected .wav files of PCM, but got .mp3; convert it: ffmpeg"),
    ):
        with pytest.raises(UserError) as caught:
            recordings.load([str(home / name)])
        assert message in str(caught.value)


def test_the_words_of_the_package() -> None:
    words = voices.words()
    assert len(words) == 106 and len(set(words.values())) == 105  # november is a month and a letter
    assert words["digits/12"] == "twelve" and words["digits/90"] == "ninety" and words["digits/mon-11"] == "december"
    assert words["letters/w"] == "W" and words["phonetic/w_p"] == "whiskey" and words["digits/day-6"] == "saturday"


def test_words_that_a_program_says_are_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = {"digits/1": "one", "letters/a": "A", "phonetic/a_p": "alpha"}
    monkeypatch.setattr(voices, "words", lambda: words)
    monkeypatch.setattr(voices, "_VARIANTS", "f1 m1 m2")
    rng, source = np.random.default_rng(0), home / "cache" / "torchweld" / "data" / "asterisk-en" / "en"
    for name in words:
        write(source / f"{name}.wav", said("rise", rng.uniform(300, 600), rng))
    write(home / "said.wav", said("fall", 500, rng, 22050), 22050)
    program = home / "bin" / "espeak-ng"
    program.parent.mkdir()
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    for script, message in (
        ("echo no such voice >&2; exit 1", "to say 'A', but got: no such voice; try"),
        ("exit 0", "got: exit code 0; try it by hand"),
    ):
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        with pytest.raises(UserError, match=message):
            recordings.load(None)
        assert [path.name for path in source.parent.parent.iterdir()] == ["asterisk-en"]
    program.write_text(f'#!/bin/sh\necho "$@" >> {home}/calls\ncp {home}/said.wav "$2"\n')
    read = recordings.load(None)
    assert read.labels == ("A", "alpha", "one") and read.speakers == (2, 1, 1) and len(read.test) == 3
    assert len(read.training) == 2 * 2 * 3 and len((home / "calls").read_text().splitlines()) == 18
    program.unlink()
    assert recordings.load(None).digest == read.digest
