"""Sentences and their translations from files: parallel texts, TSV, gettext catalogues, and JSON trees of an interface.

A JSON tree, in a folder or in a wheel, has a file for each language at the same place: `light/translations/en.json`
beside `light/translations/de.json`, or `locales/en/menu.json` beside `locales/de/menu.json`. Strings at the same keys
are a pair.
"""

from __future__ import annotations

import json
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from torchweld.errors import UserError
from torchweld.training.corpus import read_files

_LANGUAGE = re.compile(r"[a-z]{2,3}([-_][A-Za-z0-9]{2,8})*")
_ARCHIVES = (".whl", ".zip")
Read = Callable[[], bytes]


class Pair(NamedTuple):
    """A sentence and its translation. `group`: where they are from, if pairs of one place are to stay together."""

    source: str
    target: str
    group: str = ""


def read_pairs(paths: Sequence[str], source: str, target: str) -> list[Pair]:
    """All pairs of the files, white space made single, in their order.

    Args:
        paths: folders and wheels; `.tsv` files, whose first two columns are taken; `.mo` files; or two text files, the
            second of which has in each line the translation of that line of the first.
        source, target: the languages' names, by which the files of a tree are known.

    Raises:
        UserError: a file cannot be read, or does not have what is asked for.
    """
    kinds = {path: _kind(path) for path in paths}
    plain = [path for path in paths if kinds[path] is None]
    if len(plain) not in (0, 2):
        raise UserError(
            f"--data: expected two text files, line beside line, but got {len(plain)} ({', '.join(plain[:3])}); pairs "
            f"may also come from .tsv and .mo files, folders and wheels"
        )
    found = _parallel(*plain) if plain else []
    for path, read in kinds.items():
        if read is not None:
            found += read(path, source, target)
    return [Pair(" ".join(a.split()), " ".join(b.split()), group) for a, b, group in found]


def _kind(path: str) -> Callable[[str, str, str], list[Pair]] | None:
    suffix = Path(path).suffix.lower()
    if Path(path).is_dir() or suffix in _ARCHIVES:
        return _tree
    return {".tsv": _columns, ".mo": _catalogue}.get(suffix)


def _parallel(first: str, second: str) -> list[Pair]:
    sources, targets = (text.removesuffix("\n").split("\n") for text in read_files([first, second]))
    if len(sources) != len(targets):
        raise UserError(
            f"--data {first} {second}: expected as many lines in both, but got {len(sources)} and {len(targets)}; each "
            f"line of the second is the translation of that line of the first"
        )
    return [Pair(*pair) for pair in zip(sources, targets, strict=True)]


def _columns(path: str, source: str, target: str) -> list[Pair]:
    (text,) = read_files([path])
    found = []
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        if len(fields := line.split("\t")) < 2:
            raise UserError(f"--data {path}, line {number}: expected two columns with a tab between, but got one")
        found.append(Pair(*fields[:2]))
    return found


def _catalogue(path: str, source: str, target: str) -> list[Pair]:
    """A gettext catalogue: its messages and their translations; of plural forms the singular."""
    data = _bytes(path)
    order = {0x950412DE: "<", 0xDE120495: ">"}.get(int.from_bytes(data[:4], "little"))
    try:
        if order is None:
            raise ValueError("another magic number")
        count, originals, translations = struct.unpack_from(f"{order}3I", data, 8)
        found = []
        for index in range(count):
            pair = []
            for table in (originals, translations):
                length, start = struct.unpack_from(f"{order}2I", data, table + 8 * index)
                if start + length > len(data):
                    raise ValueError("a string that ends behind the file")
                pair.append(data[start : start + length].decode().split("\0")[0])
            context_and_text = pair[0].split("\4")
            if context_and_text[-1]:  # the empty message stands for the header
                found.append(Pair(context_and_text[-1], pair[1]))
    except (struct.error, ValueError) as error:
        raise UserError(f"--data {path}: expected a gettext catalogue (.mo), but got: {error}") from None
    return found


def _tree(path: str, source: str, target: str) -> list[Pair]:
    places: dict[str, dict[str, Read]] = {}
    for name, read in _files(path):
        for place, language in _places(name):
            places.setdefault(place, {})[language] = read
    languages = sorted({language for place in places.values() if source in place for language in place})
    for language in (source, target):
        if language not in languages:
            some = f"files for {', '.join(languages)}" if languages else f"no file named {source}.json or in {source}/"
            raise UserError(
                f"--data {path}: expected JSON files for {source!r} and {target!r}, but got {some}; choose with "
                f"--source-language and --target-language"
            )
    found = []
    for place, versions in sorted(places.items()):
        if source in versions and target in versions:
            ours, theirs = (_strings(f"{path}: {place.format(name)}", versions[name]) for name in (source, target))
            found += [Pair(text, theirs[key], place) for key, text in ours.items() if key in theirs]
    return found


def _places(name: str) -> Iterator[tuple[str, str]]:
    """Each way of reading a language out of a file's name: the name with {} in its place, and the language."""
    parts = name.removesuffix(".json").split("/")
    for index, part in enumerate(parts):
        if _LANGUAGE.fullmatch(part):
            escaped = [p.replace("{", "{{").replace("}", "}}") for p in parts]
            yield "/".join([*escaped[:index], "{}", *escaped[index + 1 :]]) + ".json", part


def _files(path: str) -> Iterator[tuple[str, Read]]:
    """The JSON files of a folder or an archive, by name."""
    if Path(path).is_dir():
        for file in sorted(Path(path).rglob("*.json")):
            yield PurePosixPath(file.relative_to(path)).as_posix(), file.read_bytes
        return
    try:
        archive = zipfile.ZipFile(path)
    except OSError as error:
        raise UserError(f"--data {path}: expected a readable file, but got: {error.strerror}") from None
    except zipfile.BadZipFile as error:
        raise UserError(f"--data {path}: expected a wheel or a zip archive, but got: {error}") from None
    for name in sorted(archive.namelist()):
        if name.endswith(".json"):
            yield name, partial(archive.read, name)


def _strings(place: str, read: Read) -> dict[str, str]:
    """The strings of a JSON file by the way to them."""
    try:
        values = json.loads(read().decode("utf-8-sig"))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"--data {place}: expected JSON in UTF-8, but got: {error}") from None
    return dict(_walk(values, ""))


def _walk(value: Any, way: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield way, value
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _walk(item, f"{way}/{key}")


def _bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"--data {path}: expected a readable file, but got: {error.strerror}") from None
