"""Pairs of sentences: what the readers find, what the rules take, what no split shares, what a batch is made of."""

from __future__ import annotations

import json
import re
import struct
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from torchweld.errors import UserError
from torchweld.models import seq2seq
from torchweld.training import cleaning, parallel
from torchweld.training.pairs import Pair, read_pairs
from torchweld.training.translation_memory import TranslationMemory

TINY = seq2seq.CONFIGS["tiny"]


def write(path: str, contents: object) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(contents if isinstance(contents, str) else json.dumps(contents), encoding="utf-8")


def catalogue(messages: dict[str, str], order: str) -> bytes:
    """A .mo file, its tables one after the other."""
    texts = [text.encode() for pair in sorted(messages.items()) for text in pair]
    count, place = len(messages), 28 + 16 * len(messages)
    rows = []
    for text in texts:
        rows.append(struct.pack(f"{order}2I", len(text), place))
        place += len(text) + 1
    head = struct.pack(f"{order}7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, place)
    return head + b"".join(rows[::2] + rows[1::2]) + b"".join(text + b"\0" for text in texts)


# ---- Readers


def test_two_texts_and_columns() -> None:
    write("a.en", "one  two\n\nthree\n")
    write("a.de", "eins zwei\nleer\ndrei\n")
    write("more.tsv", 'four "\tvier "\tunused\n')
    found = read_pairs(["a.en", "more.tsv", "a.de"], "en", "de")
    assert found == [Pair("one two", "eins zwei"), Pair("", "leer"), Pair("three", "drei"), Pair('four "', 'vier "')]


@pytest.mark.parametrize("order", ["<", ">"])
def test_catalogues(order: str) -> None:
    messages = {"": "Content-Type: text/plain\n", "menu\4Open": "Öffnen", "file\0files": "Datei\0Dateien", "Quit": ""}
    Path("de.mo").write_bytes(catalogue(messages, order))
    assert read_pairs(["de.mo"], "en", "de") == [Pair("Quit", ""), Pair("file", "Datei"), Pair("Open", "Öffnen")]


@pytest.mark.parametrize("archive", [False, True])
def test_trees_of_json(archive: bool) -> None:
    write("tree/light/translations/en.json", {"state": {"on": "On", "off": "Off"}, "title": "Light", "list": ["a", 1]})
    write("tree/light/translations/de.json", {"state": {"on": "An", "off": None}, "title": "Licht", "list": ["b", 2]})
    write("tree/light/manifest.json", {"on": "neither"})
    write("tree/locales/en/menu.json", {"open": "Open", "{}": "Braces"})
    write("tree/locales/de/menu.json", {"open": "Öffnen", "{}": "Klammern"})
    write("tree/only/en.json", {"a": "b"})
    path = "tree"
    if archive:
        path = "tree.whl"
        with zipfile.ZipFile(path, "w") as file:
            for name in Path("tree").rglob("*.json"):
                file.write(name, name.relative_to("tree"))
    lights, menu = "light/translations/{}.json", "locales/{}/menu.json"
    assert read_pairs([path], "en", "de") == [
        *(Pair(a, b, lights) for a, b in (("On", "An"), ("Light", "Licht"), ("a", "b"))),
        *(Pair(a, b, menu) for a, b in (("Open", "Öffnen"), ("Braces", "Klammern"))),
    ]
    assert read_pairs([path], "de", "en")[0] == Pair("An", "On", lights)
    with pytest.raises(
        UserError, match=r"JSON files for 'en' and 'fr', but got files for de, en; choose with --source"
    ):
        read_pairs([path], "en", "fr")
    with pytest.raises(UserError, match=r"but got no file named sv.json or in sv/; choose with"):
        read_pairs([path], "sv", "en")


def test_unreadable_files_are_refused() -> None:
    write("a.en", "one\ntwo\n")
    write("b.de", "eins\n")
    write("bad.tsv", "one\teins\ntwo zwei\n")
    write("bad.mo", "no catalogue")
    Path("cut.mo").write_bytes(catalogue({"a": "b", "c": "d"}, "<")[:-3])
    write("bad.whl", "no archive")
    write("tree/en.json", "{")
    write("tree/de.json", {})
    for paths, message in (
        (["a.en", "b.de"], "expected as many lines in both, but got 2 and 1"),
        (["a.en"], r"expected two text files, line beside line, but got 1 \(a.en\)"),
        (["a.en", "b.de", "a.en2"], "but got 3"),
        (["bad.tsv"], "bad.tsv, line 2: expected two columns with a tab between, but got one"),
        (["bad.mo"], r"bad.mo: expected a gettext catalogue \(.mo\), but got: another magic number"),
        (["cut.mo"], "cut.mo: expected a gettext catalogue"),
        (["absent.mo"], "absent.mo: .*No such file"),
        (["bad.whl"], "bad.whl: expected a wheel or a zip archive"),
        (["absent.whl"], "absent.whl: .*No such file"),
        (["tree"], "tree: en.json: expected JSON in UTF-8"),
    ):
        with pytest.raises(UserError, match=message):
            read_pairs(paths, "en", "de")


# ---- Rules and splits


def test_rules_take_what_they_name() -> None:
    pairs = [
        Pair("a good pair", "ein gutes Paar"),
        Pair("", "leer"),
        Pair("full", ""),
        Pair("same", "same"),
        Pair("see https://example.org", "siehe dort"),
        Pair("one two three four five", "eins"),
        Pair("short", "eine ziemlich lange Übersetzung"),
        Pair("u\u0308ber", "over"),
    ]
    dropped = cleaning.Dropped()
    assert cleaning.clean(pairs, 4, dropped) == [pairs[0], Pair("über", "over")]
    expected = "2 with an empty side, 1 not translated, 1 with a link, 1 of more than 4 words, 1 of unlike lengths"
    assert str(dropped) == expected


def test_splits_share_no_source() -> None:
    pairs = [Pair(f"text {i % 3000}", f"Text {i % 3000} {i % 2}", f"place {i % 41}") for i in range(4000)]
    dropped = cleaning.Dropped()
    training, validation, test = cleaning.split(pairs, dropped)
    sources = [{pair.source for pair in part} for part in (training, validation, test)]
    assert not sources[0] & (sources[1] | sources[2])
    assert len(training) + len(validation) + len(test) + sum(dropped.values()) == len(pairs)
    assert all(max(Counter(part).values()) == 1 for part in (training, validation, test))
    # Without places the source decides, so nothing is in two parts, and the shares are as asked for.
    free = [Pair(f"text {i}", f"Text {i}") for i in range(4000)]
    sizes = [len(part) for part in cleaning.split(free, dropped)]
    assert sum(sizes) == 4000 and sizes[1:] == [pytest.approx(160, rel=0.3), pytest.approx(320, rel=0.3)]


def test_too_few_pairs_are_refused_with_the_rules_that_took_them() -> None:
    pairs = [Pair(f"text {i}", f"text {i}") for i in range(300)] + [Pair(f"text {i}", f"Text {i}") for i in range(90)]
    dropped = cleaning.Dropped()
    message = r"at least 100 pairs for training, .* but got \d+ / \d+ / \d+; dropped: 300 not translated; give more"
    with pytest.raises(UserError, match=message):
        cleaning.split(cleaning.clean(pairs, 16, dropped), dropped)


# ---- Tokens and batches


@pytest.fixture
def data(home: Path) -> parallel.Parallel:
    words = [f"{a}{b}" for a in ("ka", "lo", "mi", "su", "te") for b in ("ra", "ne", "po", "ti")]
    draw = np.random.default_rng(0)
    pairs = []
    for _ in range(500):
        chosen = [words[i] for i in draw.integers(len(words), size=draw.integers(1, 9))]
        pairs.append(Pair(" ".join(chosen), " ".join(word.upper() for word in chosen)))
    return parallel.load(pairs, TINY, None)


def test_tokens_are_those_of_the_sentences(data: parallel.Parallel) -> None:
    tokenizer = data.tokenizer
    for part in (data.training, data.validation, data.test):
        for pair, source, target in zip(part.pairs, part.sources, part.targets, strict=True):
            assert [tokenizer.encode(text).ids for text in pair[:2]] == [source, target]
            assert tokenizer.decode(source).strip() == pair.source and source[-1] == seq2seq.END
    cached = parallel.load([*data.training.pairs, *data.validation.pairs, *data.test.pairs], TINY, None)
    assert cached.digest == data.digest and cached.training.sources == data.training.sources


def test_marks_in_a_text_are_text() -> None:
    pairs = [Pair(f"</s> number {i} <pad>", f"</s> Nummer {i}") for i in range(300)]
    data = parallel.load(pairs, TINY, None)
    assert all(min(tokens[:-1]) > 3 for tokens in data.training.sources)
    assert len(data.training) + len(data.validation) + len(data.test) == 300


def test_an_epoch_has_every_pair_once_in_lots_of_like_lengths(data: parallel.Parallel) -> None:
    schedule = data.schedule(200, 7)
    count = len(schedule.lots)
    epochs = [[schedule.lot(epoch * count + i).tolist() for i in range(count)] for epoch in (0, 1)]
    for lots in epochs:
        assert sorted(index for lot in lots for index in lot) == list(range(len(data.training)))
    assert epochs[0] != epochs[1]
    totals = [data.training.batch(lot).count for lot in epochs[0]]
    assert sum(200 <= total < 264 for total in totals) >= count - 1  # the last one has what was left
    assert min(totals) >= 100 and max(totals) < 364
    padded = sum(len(lot) * max(len(data.training.sources[i]) for i in lot) for lot in epochs[0])
    assert padded < 1.1 * sum(map(len, data.training.sources))
    again = parallel.Schedule(data.training, 200, 7)
    assert again.lot(count + 3).tolist() == epochs[1][3]
    assert parallel.Schedule(data.training, 200, 8).lot(3).tolist() != epochs[0][3]


def test_a_batch_is_the_arguments_of_the_loss(data: parallel.Parallel) -> None:
    batch = data.training.batch([5, 2, 9])
    source, source_bounds, inputs, bounds, targets = batch.tensors
    for place, index in enumerate([5, 2, 9]):
        own = slice(int(bounds[place]), int(bounds[place + 1]))
        assert targets[own].tolist() == data.training.targets[index]
        assert inputs[own].tolist() == [seq2seq.END, *data.training.targets[index][:-1]]
        own = slice(int(source_bounds[place]), int(source_bounds[place + 1]))
        assert source[own].tolist() == data.training.sources[index]
    assert batch.weights == {"loss": len(targets)} and batch.count == len(source) + len(targets)
    assert bounds.dtype == source_bounds.dtype == torch.int32
    with pytest.raises(UserError, match=re.escape("--batch-size: expected tokens of at least a pair for each of 99")):
        data.schedule(200, 0).check(99)


def test_translation_memory_finds_the_nearest() -> None:
    memory = TranslationMemory(["open the door", "close the door", "good morning"], ["auf", "zu", "hallo"])
    asked = ["opened the door", "Close this door", "a good morning to you", "xyz"]
    assert list(memory.translate(asked)) == ["auf", "zu", "hallo", "auf"]
