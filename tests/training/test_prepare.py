"""`torchweld prepare`: what each step does, counts and writes; what is refused, and that nothing is half-written."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from commands import Run
from torchweld.training import corpus, labelled
from torchweld.training.pairs import Pair, read_pairs

TEXTS = [f"line number {i} says some words about things" for i in range(60)]


def steps(out: str) -> dict[str, dict[str, Any]]:
    """The objects of --json by the name of the step."""
    return {row["step"]: row for row in map(json.loads, out.splitlines()) if "step" in row}


def rows(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# ---- Steps


def test_texts_are_normalised_and_come_once(home: Path, command: Run) -> None:
    (home / "a.txt").write_text(
        "\ufeffu\u0308ber  all\tof\x07 it\n\n\u00fcber all of it\nPlain [MASK] text\n \x01 \nPlain [MASK] text\n"
    )
    code, out, error = command("prepare", "--data", "a.txt", "--out", "b.txt", "--json")
    assert code == 0, error
    assert (home / "b.txt").read_text() == "über all of it\nPlain [MASK] text\n"
    found = steps(out)
    assert [(row["step"], row["before"], row["after"]) for row in found.values()] == [
        ("read", 6, 6),
        ("normalise", 6, 6),
        ("empty", 6, 4),
        ("duplicates", 4, 2),
    ]
    assert found["normalise"]["what"] == "2 changed"
    assert found["normalise"]["example"] == "u\u0308ber  all\\tof\\x07 it -> über all of it"
    assert found["empty"]["what"] == "dropped: 2 without a character"
    assert found["duplicates"] == {**found["duplicates"], "what": "dropped: 2 twice", "example": "über all of it"}
    assert json.loads(out.splitlines()[-1]) == {"written": ["b.txt"]}
    code, out, _ = command("prepare", "--data", "b.txt", "--out", "c.txt")
    assert code == 0 and "Plain" not in out and "written: c.txt" in out and "dropped: nothing" in out


def test_standard_input(home: Path, command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for given, code, message in (("one  text\ntwo", 0, ""), ("", 2, "read left none of 0")):
        monkeypatch.setattr(sys, "stdin", io.StringIO(given))
        found, _, error = command("prepare", "--data", "-", "--out", "o.txt", "--overwrite")
        assert found == code and message in error
        assert (home / "o.txt").read_text() == "one text\ntwo\n"


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_columns_keep_their_labels(home: Path, command: Run, suffix: str) -> None:
    found = [("good", "a  film"), ("bad", "a film"), ("good", "a book"), ("good", "a book"), ("so\xa0so", 'say "no"')]
    if suffix == "jsonl":
        contents = "".join(json.dumps({"kind": kind, "said": said, "more": 1}) + "\n" for kind, said in found)
    elif suffix == "csv":
        contents = "kind,said\n" + "".join(f'{kind},"{said.replace(chr(34), chr(34) * 2)}"\n' for kind, said in found)
    else:
        contents = "kind\tsaid\n" + "".join(f"{kind}\t{said}\n" for kind, said in found)
    (home / f"in.{suffix}").write_text(contents)
    words = ("--data", f"in.{suffix}", "--text", "said", "--label", "kind")
    code, out, error = command("prepare", *words, "--out", "out.tsv", "--json")
    assert code == 0, error
    assert steps(out)["duplicates"]["what"] == "dropped: 1 twice, with another label, 1 twice"
    assert (home / "out.tsv").read_text() == 'text\tlabel\na film\tgood\na book\tgood\nsay "no"\tso so\n'
    read = labelled.read_rows(["out.tsv"], "text", "label")  # as fine-tune does
    assert read.texts == ["a film", "a book", 'say "no"'] and read.labels == ["good", "good", "so so"]
    assert command("prepare", *words, "--out", "out.jsonl")[0] == 0
    assert rows("out.jsonl")[0] == {"text": "a film", "label": "good"}


def test_splits_share_no_text_and_are_those_of_fine_tune(home: Path, command: Run) -> None:
    (home / "a.txt").write_text("".join(f"{text}\n{text}\n" for text in TEXTS))
    code, out, error = command("prepare", "--data", "a.txt", "--out", "o.txt", "--split", "--max-words", 8, "--json")
    assert code == 0, error
    parts = [(home / f"o-{part}.txt").read_text().splitlines() for part in ("training", "validation", "test")]
    wanted = labelled.split(labelled.Rows(TEXTS, [""] * 60, [""] * 60))
    assert parts == [part.texts for part in wanted]
    sizes = [len(part) for part in parts]
    assert sum(sizes) == 60
    assert steps(out)["split"]["what"] == "{} for training, {} for validation, {} for test".format(*sizes)
    assert steps(out)["long"]["what"] == "dropped: nothing" and not (home / "o.txt").exists()


def test_pairs_go_through_the_rules_of_training(home: Path, command: Run) -> None:
    pairs = [(f"text number {i}", f"Text Nummer {i}") for i in range(200)]
    pairs += [pairs[0], ("same", "same"), ("", "leer"), ("see http://x", "siehe http://x"), ("a", "b" * 50)]
    (home / "a.en").write_text("".join(a + "\n" for a, _ in pairs))
    (home / "a.de").write_text("".join(b + "\n" for _, b in pairs))
    words = ("prepare", "--pairs", "--data", "a.en", "a.de")
    code, out, error = command(*words, "--out", "o.tsv", "--json")
    assert code == 0, error
    rules = [row for row in map(json.loads, out.splitlines()) if row.get("step") == "rules"]
    assert [(row["before"], row["after"], row["what"], row["example"]) for row in rules] == [
        (205, 204, "dropped: 1 not translated", "same | same"),
        (204, 203, "dropped: 1 with an empty side", " | leer"),
        (203, 202, "dropped: 1 with a link", "see http://x | siehe http://x"),
        (202, 201, "dropped: 1 of unlike lengths", f"a | {'b' * 50}"),
    ]
    assert steps(out)["duplicates"]["what"] == "dropped: 1 twice"
    assert read_pairs(["o.tsv"], "en", "de") == [Pair(*pair) for pair in pairs[:200]]
    code, out, error = command(*words, "--out", "p.jsonl", "--split", "--tokenize", "bpe", "--vocab-size", 400)
    assert code == 0, error
    found = {part: rows(f"p-{part}.jsonl") for part in ("training", "validation", "test")}
    assert sum(map(len, found.values())) == 200
    sources = {part: {row["source"] for row in part_rows} for part, part_rows in found.items()}
    assert not sources["training"] & (sources["validation"] | sources["test"])
    tokenizer = Tokenizer.from_file("p-tokenizer.json")
    for row in found["test"]:
        for side in ("source", "target"):
            assert tokenizer.encode(row[side]).ids == row[f"{side}_tokens"]


def test_words_have_one_length(home: Path, command: Run) -> None:
    (home / "a.txt").write_text("It isn't easy, they say!\nYes\n")
    words = ("prepare", "--data", "a.txt", "--tokenize", "words", "--length", 4)
    code, out, error = command(*words, "--out", "o.txt", "--json")
    assert code == 0, error
    assert (home / "o.txt").read_text() == "it isn't easy ,\nyes [PAD] [PAD] [PAD]\n"
    assert steps(out)["length"]["what"] == "1 cut and 1 padded to 4 tokens"
    assert steps(out)["tokenise"]["what"] == "5 words"
    assert command(*words, "--out", "o.jsonl")[0] == 0
    assert rows("o.jsonl")[1] == {"text": "yes", "tokens": ["yes", "[PAD]", "[PAD]", "[PAD]"]}


@pytest.mark.parametrize("kind, pad", [("wordpiece", "[PAD]"), ("bpe", "<|endoftext|>")])
def test_tokens_are_learned_from_training_alone_and_used_again(home: Path, command: Run, kind: str, pad: str) -> None:
    tested = labelled.split(labelled.Rows([f"ж {i}" for i in range(60)], [""] * 60, [""] * 60))[2].texts
    (home / "a.txt").write_text("".join(text + "\n" for text in TEXTS + tested))
    words = ("prepare", "--data", "a.txt", "--split", "--length", 9)
    code, out, error = command(*words, "--tokenize", kind, "--vocab-size", 330, "--out", "o.jsonl", "--json")
    assert code == 0, error
    tokenizer = Tokenizer.from_file("o-tokenizer.json")
    assert tokenizer.truncation is None and tokenizer.padding is None
    training = [row["text"] for row in rows("o-training.jsonl")]
    if kind == "bpe":
        assert tokenizer.get_vocab() == corpus.train_tokenizer(training, 330).get_vocab()
    else:  # which of equally frequent pieces comes first differs
        assert not any("ж" in token for token in tokenizer.get_vocab()) and "line" in tokenizer.get_vocab()
    cut = padded = 0
    for part in ("training", "validation", "test"):
        for row in rows(f"o-{part}.jsonl"):
            whole = tokenizer.encode(row["text"]).ids
            assert len(row["tokens"]) == 9
            cut, padded = cut + (len(whole) > 9), padded + (len(whole) < 9)
            if len(whole) <= 9:
                assert row["tokens"] == whole + [tokenizer.token_to_id(pad)] * (9 - len(whole))
            elif kind == "wordpiece":
                assert row["tokens"] == [*whole[:8], whole[-1]]  # [SEP] stays
            else:
                assert row["tokens"] == whole[:9]
    assert f"{cut} cut and {padded} padded to 9 tokens" in out and cut + padded > 0
    (home / "model").mkdir()
    (home / "model/config.json").write_text("{}")
    (home / "o-tokenizer.json").rename(home / "model/tokenizer.json")
    code, _, error = command(*words, "--tokenize", "model", "--out", "again.jsonl")
    assert code == 0, error
    assert rows("again-test.jsonl") == rows("o-test.jsonl") and not (home / "again-tokenizer.json").exists()


def test_stop_words_and_stems(home: Path, command: Run) -> None:
    for library in ("snowballstemmer", "stop_words"):
        pytest.importorskip(library, reason="stop words and stems, a test extra")
    (home / "a.txt").write_text("The ponies aren\u2019t running\nThe Zebra runs\nIt is the\n")
    words = ("prepare", "--data", "a.txt", "--stop-words", "english", "--stem", "english")
    code, out, error = command(*words, "--out", "o.txt", "--json")
    assert code == 0, error
    assert (home / "o.txt").read_text() == "poni run\nzebra run\n"
    found = steps(out)
    assert found["stop words"]["example"] == "the ponies aren\u2019t running -> ponies running"
    assert found["empty"]["what"] == "dropped: 1 of stop words alone"
    assert found["stem"]["what"] == "2 changed; 4 different words became 3"
    for option, message in (("--stop-words", "expected one of arabic, "), ("--stem", "expected one of arabic, ")):
        code, _, error = command("prepare", "--data", "a.txt", "--out", "p.txt", option, "klingon")
        assert code == 2 and f"{option}: {message}" in error and "but got 'klingon'" in error


def test_languages(home: Path, command: Run) -> None:
    pytest.importorskip("py3langid", reason="tells languages, a test extra")
    (home / "a.txt").write_text("What a lovely day it was\nDas ist ein schönes Haus am See\nOK\n")
    code, out, error = command("prepare", "--data", "a.txt", "--out", "o.txt", "--language", "en", "--json")
    assert code == 0, error
    assert (home / "o.txt").read_text() == "What a lovely day it was\nOK\n"  # of what is short nothing is sure
    assert steps(out)["language"]["what"] == "dropped: 1 in de"
    (home / "a.tsv").write_text("Open the door\tDie Tür öffnen\nDas ist ein Haus\tThis is a house\nOn\tAn\n")
    words = ("prepare", "--pairs", "--data", "a.tsv", "--out", "o.tsv", "--language", "en")
    code, out, error = command(*words, "de", "--json")
    assert code == 0, error
    assert (home / "o.tsv").read_text() == "Open the door\tDie Tür öffnen\nOn\tAn\n"
    code, _, error = command(*words, "xx", "--overwrite")
    assert code == 2 and "--language: expected codes out of " in error and "but got 'xx'" in error


# ---- Refusals


@pytest.mark.parametrize(
    "words, message",
    [
        (["--out", "o.csv"], "--out o.csv: expected a name that ends in .txt, .tsv, .jsonl, but got '.csv'"),
        (["--out", "o"], "--out o: expected a name that ends in .*, but got 'none'"),
        (["--out", "there.txt"], "but there.txt is; replace it with --overwrite"),
        (["--out", "folder.txt", "--overwrite"], "folder.txt: expected a file that can be written, but got: Is a dir"),
        (["--out", "absent/o.txt"], "absent/o.txt: expected a file that can be written, but got: No such file"),
        (["--data", "absent.txt"], "--data absent.txt: expected a readable text file, but got: No such file"),
        (["--data", "bytes.txt"], "--data bytes.txt: expected UTF-8 text, but got byte 0xff at offset 3"),
        (["--data", "blank.txt"], "--data blank.txt: expected text, but the file is empty"),
        (["--data", "a.tsv"], "--data a.tsv: expected a column 'text' in its first line, but got 'said', 'kind'"),
        (["--data", "a.tsv", "--text", "said", "--label", "x", "--out", "o.tsv"], "expected a column 'x'"),
        (["--data", "bad.jsonl"], "--data bad.jsonl, line 2: expected a JSON object"),
        (["--data", "other.jsonl"], "other.jsonl, line 1: expected an object with 'text', but got 'said'"),
        (["--label", "kind"], "--label: expected labelled texts and a place for labels, but got --out o.txt"),
        (
            ["--length", "3"],
            "--length: expected --tokenize, whose tokens it counts, but got none; add --tokenize words",
        ),
        (["--length", "0"], "--length: expected a whole number of at least 1, but got '0'"),
        (["--vocab-size", "5"], "--vocab-size: expected a whole number of at least 300"),
        (["--tokenize", "letters"], "--tokenize: expected words, bpe, wordpiece or the directory of a model"),
        (["--tokenize", "folder.txt"], "checkpoint folder.txt"),
        (["--tokenize", "wordpiece", "--length", "2"], "--length: expected more than the 2 special tokens"),
        (["--language", "en", "de"], "--language: expected 1 code.* but got 2"),
        (["--pairs"], "--out o.txt: expected .tsv or .jsonl for pairs, but got .txt"),
        (["--pairs", "--stem", "english"], "--stem: expected texts, but got --pairs"),
        (["--pairs", "--label", "1", "--out", "o.tsv"], "--label: expected labelled texts .* but got pairs"),
        (["--pairs", "--out", "o.tsv"], "--data: expected two text files, line beside line, but got 1"),
        (["--pairs", "--data", "same.tsv", "--out", "o.tsv"], "but rules left none of 1 .dropped: 1 not translated."),
        (["--pairs", "--data", "few.tsv", "--out", "o.tsv", "--split"], "expected at least 100 pairs for training"),
        (["--max-words", "1"], "long left none of 2 .dropped: 2 of more than 1 words.; give more texts, or ask for"),
        (["--split"], "--data: expected texts for training, validation and test, but got .* of 2"),
    ],
)
def test_refusals_leave_nothing(home: Path, command: Run, words: list[str], message: str) -> None:
    (home / "folder.txt").mkdir()
    for name, contents in {
        "a.txt": "one text\nanother text\n",
        "there.txt": "mine\n",
        "blank.txt": " \n",
        "a.tsv": "said\tkind\nx\ty\n",
        "same.tsv": "x\tx\n",
        "few.tsv": "one\teins\ntwo\tzwei\n",
        "bad.jsonl": '{"text": "a"}\n{"text"\n',
        "other.jsonl": '{"said": "a"}\n',
    }.items():
        (home / name).write_text(contents)
    (home / "bytes.txt").write_bytes(b"abc\xff")
    before = {path: path.read_bytes() for path in home.iterdir() if path.is_file()}
    given = ["--data", "a.txt", *words] if "--data" not in words else words
    code, out, error = command("prepare", *given, *([] if "--out" in words else ["--out", "o.txt"]))
    assert code == 2 and out == "" and re.search(message, error), error
    assert {path: path.read_bytes() for path in home.iterdir() if path.is_file()} == before
    assert list((home / "folder.txt").iterdir()) == []


@pytest.mark.parametrize(
    "module, library, words",
    [
        ("snowballstemmer", "snowballstemmer", ("--stem", "english")),
        ("stop_words", "stop-words", ("--stop-words", "english")),
        ("py3langid", "py3langid", ("--language", "en")),
    ],
)
def test_a_missing_library_is_named_with_its_extra(
    home: Path, command: Run, monkeypatch: pytest.MonkeyPatch, module: str, library: str, words: tuple[str, str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    (home / "a.txt").write_text("one text\n")
    code, _, error = command("prepare", "--data", "a.txt", "--out", "o.txt", *words)
    assert code == 2 and f"{words[0]} needs {library}: pip install torchweld[prepare]" in error
    assert not (home / "o.txt").exists()


def test_a_full_disk_leaves_what_was_there(home: Path, command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "a.txt").write_text("".join(text + "\n" for text in TEXTS))
    (home / "o-training.txt").write_text("of before\n")
    write = Path.write_text

    def full(self: Path, *args: Any, **options: Any) -> int:
        if "o-test" in self.name:
            write(self, "hal")
            raise OSError(28, "No space left on device")
        return write(self, *args, **options)

    monkeypatch.setattr(Path, "write_text", full)
    code, _, error = command("prepare", "--data", "a.txt", "--out", "o.txt", "--split", "--overwrite")
    assert code == 2 and "o-test.txt: expected a file that can be written, but got: No space left" in error
    assert sorted(path.name for path in home.iterdir() if path.is_file()) == ["a.txt", "o-training.txt"]
    assert (home / "o-training.txt").read_text() == "of before\n"
