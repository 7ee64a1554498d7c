"""Words for training that eSpeak NG says, and for the test recordings of the same words by a person.

The recordings are those of Asterisk, one of each word: the numbers, the letters, the phonetic alphabet, days and
months. eSpeak NG is a program that the machine has, or not; what it has said is kept in the cache.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from torchweld.errors import UserError
from torchweld.training import packages, waves
from torchweld.training.corpus import cache_directory

PROGRAM = "espeak-ng"
SOURCE = "asterisk-en"
_VARIANTS = "f1 f2 f3 f4 f5 m1 m2 m3 m4 m5 m6 m7 m8 Annie linda steph belinda Alicia Andrea klatt"
_ACCENTS = ("en-us", "en-gb")
_SPEEDS, _PITCHES = (120, 140, 165), (35, 50, 65)  # words a minute; of 0 to 99

_NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
_NUMBERS += "seventeen eighteen nineteen twenty"
_TENS = "thirty forty fifty sixty seventy eighty ninety"
_PHONETIC = "alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november oscar papa quebec "
_PHONETIC += "romeo sierra tango uniform victor whiskey x-ray yankee zulu"
_DAYS = "sunday monday tuesday wednesday thursday friday saturday"
_MONTHS = "january february march april may june july august september october november december"
_MORE = "hundred thousand million billion today tomorrow yesterday"


def words() -> dict[str, str]:
    """The word in each of Asterisk's files; a letter by its capital."""
    found = {f"digits/{i}": word for i, word in enumerate(_NUMBERS.split())}
    found |= {f"digits/{10 * i}": word for i, word in enumerate(_TENS.split(), 3)}
    found |= {f"digits/day-{i}": word for i, word in enumerate(_DAYS.split())}
    found |= {f"digits/mon-{i}": word for i, word in enumerate(_MONTHS.split())}
    found |= {f"digits/{word}": word for word in _MORE.split()}
    found |= {f"letters/{word[0]}": word[0].upper() for word in _PHONETIC.split()}
    return found | {f"phonetic/{word[0]}_p": word for word in _PHONETIC.split()}


def folder() -> Path:
    """The folder with `train` and `test`; it is made when it is first asked for.

    Raises:
        UserError: Asterisk's recordings or eSpeak NG are not here.
    """
    made = cache_directory() / "data" / "spoken-words"
    if made.is_dir():
        return made
    source = packages.find(SOURCE)
    recordings = next((path.parent for path in source.rglob("digits")), source)
    if shutil.which(PROGRAM) is None:
        raise UserError(
            f"--data: expected a folder of recordings, or the command {PROGRAM}, which says the words for training, "
            f"but it is not here; install it (apt-get install {PROGRAM})"
        )
    try:
        _make(made, recordings)
    except OSError as error:
        if not made.is_dir():  # else another process was faster
            raise UserError(f"--data: expected to write {made}, but got: {error.strerror or error}") from None
    return made


def _make(made: Path, recordings: Path) -> None:
    made.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=made.parent, prefix=".spoken-words-") as aside, ThreadPoolExecutor() as pool:
        whole = Path(aside) / "whole"
        for name, word in words().items():
            for part in ("test", "train"):
                (whole / part / word).mkdir(parents=True, exist_ok=True)
            shutil.copy(recordings / f"{name}.wav", whole / "test" / word / f"asterisk_{name.replace('/', '-')}.wav")
        list(pool.map(_say, _spoken(whole / "train")))
        whole.rename(made)


def _spoken(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Each file and the options of what is said in it."""
    for word in sorted(set(words().values())):
        for i, (variant, accent) in enumerate(product(_VARIANTS.split(), _ACCENTS)):
            speed, pitch = _SPEEDS[i % 3], _PITCHES[i // 3 % 3]
            path = root / word / f"{variant}_{accent}.wav"
            yield path, ["-v", f"{accent}+{variant}", "-s", str(speed), "-p", str(pitch), word]


def _say(task: tuple[Path, list[str]]) -> None:
    path, options = task
    run = subprocess.run([PROGRAM, "-w", str(path), *options], capture_output=True, text=True, check=False)
    if run.returncode or not path.exists():
        reason = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
        raise UserError(f"train speech: expected {PROGRAM} to say {options[-1]!r}, but got: {reason}; try it by hand")
    waves.write(path, waves.read(path))  # a twentieth of its size
