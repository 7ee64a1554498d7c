"""`--dataset`: a data set in a folder becomes a file that a program reads; what the library cannot load is refused."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from commands import Run
from torchweld.errors import UserError
from torchweld.training import hub, ratings
from torchweld.training.labelled import read_rows
from torchweld.training.pairs import Pair, read_pairs
from torchweld.training.programs import PROGRAMS


@pytest.fixture
def datasets(home: Path) -> Any:
    """The library itself, with a cache of the test's own, silent and without network."""
    library = pytest.importorskip("datasets", reason="loads data sets of Hugging Face, a test extra")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library.config, "HF_DATASETS_CACHE", home / "datasets")
        patch.setattr(library.config, "HF_HUB_OFFLINE", True)
        library.disable_progress_bars()
        yield library
        library.enable_progress_bars()


def write(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(program: str, dataset: str = "folder", **options: str | None) -> tuple[str, str]:
    return hub.load(dataset, program, options)


@pytest.mark.usefixtures("datasets")
@pytest.mark.parametrize("program", ["gpt2", "gpt3", "bert"])
def test_running_text(program: str) -> None:
    write("folder/train.jsonl", [{"text": "one\n", "id": 1}, {"text": "two", "id": 2}, {"text": None, "id": 3}])
    write("folder/test.jsonl", [{"text": "three", "id": 4}])
    path, said = read(program)
    assert Path(path).read_text() == "one\ntwo\n" and path.endswith(".txt")
    assert said == f"dataset: folder, 3 rows of its part train, in {path}"
    write("other/train.jsonl", [{"said": "four", "id": 2}])
    assert Path(read(program, "other")[0]).read_text() == "four\n"
    write("both/train.jsonl", [{"said": "four", "meant": "five"}])
    with pytest.raises(UserError, match="--dataset both: expected a column 'text', but got 'said', 'meant'"):
        read(program, "both")


def test_labels_have_their_names(datasets: Any) -> None:
    features = datasets.Features({"said": datasets.Value("string"), "kind": datasets.ClassLabel(names=["bad", "good"])})
    rows = {"said": ["a film", "a\nbook", "a day", "a \u00fc"], "kind": [1, 0, -1, 1]}
    datasets.Dataset.from_dict(rows, features).to_parquet("folder/train.parquet")
    path, _ = read("classify", text="said", label="kind")
    found = read_rows([path], "said", "kind")
    assert found.texts == ["a film", "a book", "a \u00fc"] and found.labels == ["good", "bad", "good"]
    with pytest.raises(UserError, match="expected a column 'label', but got 'said', 'kind'; name the columns with --t"):
        read("regress", text="said", label=None)


@pytest.mark.usefixtures("datasets")
def test_pairs() -> None:
    pairs = [{"en": "one\ttwo", "de": "eins zwei"}, {"en": "three", "de": "drei"}]
    write("folder/train.jsonl", [{"translation": pair} for pair in pairs])
    write("flat/train.jsonl", pairs)
    for name in ("folder", "flat"):
        path, _ = read("seq2seq", name, source_language=None, target_language=None)
        assert read_pairs([path], "en", "de") == [Pair("one two", "eins zwei"), Pair("three", "drei")]
        assert Path(read("seq2seq", name, source_language="de", target_language="en")[0]).read_text()[:4] == "eins"
        with pytest.raises(UserError, match=f"--dataset {name}: expected .*'fr'.*; choose with --source-language and"):
            read("seq2seq", name, target_language="fr")


@pytest.mark.usefixtures("datasets")
def test_ratings() -> None:
    rows = [
        {"user_id": u, "item_id": f"i{(u + t) % 5}", "timestamp": 10 - t, "more": [t]} for u in (1, 2) for t in range(4)
    ]
    write("folder/train.jsonl", rows)
    path, _ = read("recommender")
    with Path(path).open() as file:
        assert next(csv.reader(file)) == ["user_id", "item_id", "timestamp"]
    found = ratings.load([path])
    assert [[found.items[item - 1] for item in row] for row in found.histories] == [
        ["i4", "i3", "i2", "i1"],
        ["i0", "i4", "i3", "i2"],
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("datasets")
def test_a_run_learns_and_resumes_without_it(command: Run, text: str) -> None:
    write("folder/train.jsonl", [{"text": line} for line in Path(text).read_text().splitlines()])
    options = ("--config", "tiny", "--device", "cpu", "--no-keep-memory", "--out", "run")
    code, out, error = command("train", "gpt2", "--dataset", "folder", *options, "--steps", 1)
    assert code == 0 and out.startswith("dataset: folder, ") and "text: 1 files" in out, error
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "datasets", None)
        code, out, error = command("train", "gpt2", "--resume", "run", "--steps", 2, "--device", "cpu")
    assert code == 0 and "resuming after step 1" in out, error
    for words, message in (
        (["--resume", "run"], "--dataset: expected none beside --resume"),
        (["--data", "text.py"], "--dataset: expected none beside --data"),
    ):
        code, _, error = command("train", "gpt2", "--dataset", "folder", *words)
        assert code == 2 and message in error


@pytest.mark.usefixtures("datasets")
@pytest.mark.parametrize(
    "dataset, message",
    [
        ("folder:other", "but got: BuilderConfig 'other' not found. Available: ['default']; see https"),
        ("empty", "expected a data set of Hugging Face or a local folder, but got: "),
        ("parts", "expected a part 'train', but got 'validation', 'test'"),
        ("blank", "--dataset blank: expected rows with values in the columns, but got none"),
        (":config", "--dataset: expected NAME or NAME:CONFIG, but got ':config'"),
    ],
)
def test_what_cannot_be_loaded_is_refused(command: Run, dataset: str, message: str) -> None:
    write("folder/train.jsonl", [{"text": "one"}])
    write("parts/validation.jsonl", [{"text": "one"}])
    write("parts/test.jsonl", [{"text": "one"}])
    write("blank/train.jsonl", [{"text": " "}])
    Path("empty").mkdir()
    code, _, error = command("train", "bert", "--dataset", dataset)
    assert code == 2 and message in error and not Path("torchweld-bert").exists()


def fake(load: Callable[[str, str | None], object]) -> ModuleType:
    """A library of that name."""
    module = ModuleType("datasets")
    module.__spec__ = __spec__
    module.load_dataset = load  # type: ignore[attr-defined]
    return module


def test_name_and_config_go_to_the_library(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, config: str | None) -> object:
        asked.append((name, config))
        raise ConnectionError("Couldn't reach the Hub\nsecond line")

    monkeypatch.setitem(sys.modules, "datasets", fake(load))
    for dataset in ("owner/name:a-config", "name"):
        code, _, error = command("train", "gpt2", "--dataset", dataset)
        message = (
            "expected the network, the library's cache or a local folder, but got: Couldn't reach the Hub; try again"
        )
        assert code == 2 and f"--dataset {dataset}: {message}" in error
    assert asked == [("owner/name", "a-config"), ("name", None)]
    monkeypatch.setitem(sys.modules, "datasets", None)
    code, _, error = command("train", "gpt2", "--dataset", "name")
    assert code == 2 and "--dataset needs datasets: pip install torchweld[hub]" in error
    code, _, error = command("train", "vit", "--dataset", "name")
    assert code == 2 and "one of gpt2, gpt3, bert, seq2seq, recommender, classify, regress, but got vit" in error


def test_every_writer_is_of_a_program() -> None:
    assert set(hub._WRITERS) <= {*PROGRAMS, "classify", "regress"}
