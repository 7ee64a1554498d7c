"""`torchweld bench` and its files: the page, --from, compare, --csv, and what is refused."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

import bench_rows
from outline import Outline
from torchweld.bench import compare, csv_file, page, report
from torchweld.bench.activations import activations
from torchweld.bench.command import ACTIVATIONS
from torchweld.bench.harness import Settings
from torchweld.cli import main
from torchweld.errors import UserError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    report.write(bench_rows.rows(), tmp_path / "rows.json")
    return tmp_path / "rows.json"


# ---- The page


def test_the_page_is_whole_and_needs_no_network(file: Path, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    assert main(["bench", "--report", str(target), "--from", str(file)]) == 0
    text = target.read_text()
    Outline(text).check()
    assert "default-src 'none'" in text
    assert "<padded>" not in text and "&lt;padded&gt; &amp; causal" in text
    assert "made by torchweld" in text.lower() and "from rows.json" in text


def test_the_page_of_a_sweep_is_small() -> None:
    rows = [row for _ in range(8) for row in bench_rows.rows()]  # 584, as many as a sweep on one machine
    assert len(page.build(rows, ["rows.json"]).html()) < 1_500_000 / 2


def test_the_page_has_every_row_and_the_wrong_one_in_red(file: Path) -> None:
    rows = report.read(file)
    text = page.build(rows, ["rows.json"]).html()
    table = text[text.index('<table class="sortable" id="table-all-measurements"') :]
    table = table[: table.index("</table>")]
    assert table.count("<tr") == 1 + len(rows) and table.count('<tr class="wrong"') == 1
    assert "1 result broke the accuracy rule" in text and "case &#x27;1 x 1&#x27;, output: off by 1" in text
    clean = page.build(report.timed(rows), ["rows.json"]).html()
    assert "Wrong results</h2>" not in clean and '<tr class="wrong"' not in clean


def test_ratios_are_those_of_the_medians() -> None:
    found = page.build(report.timed(bench_rows.rows()), ["here"]).html()
    maps = re.findall(r'<table class="heat"><caption><span>(.*?)</span></caption>(.*?)</table>', found)
    assert [caption for caption, _ in maps] == [
        f"{op}, {rival}&#x27;s time over torchweld&#x27;s"
        for rival in ("torch", "torch:flash")
        for op in ("layer_norm", "attention")
    ]
    for caption, body in maps:
        cells = re.findall(r"<td([^>]*)>([\d.]+)</td>", body)
        expected = ("0.90", ' class="down1"') if "flash" in caption else ("2.00", ' class="up3"')
        assert len(cells) == 12 and {(value, kind) for kind, value in cells} == {expected}


def test_a_roofline_has_each_row_and_what_the_machine_did() -> None:
    found = page.build(report.timed(bench_rows.rows()), ["here"]).html()
    figures = re.findall(r"<figure>.*?</figure>", found)
    assert [figure.count('r="4"') for figure in figures] == [12 + 1, 6 + 1, 6 + 1]  # circles are ours; one in the key
    assert all(figure.count("stroke-dasharray") == 2 for figure in figures)
    assert "torchweld, layer_norm forward, 8 x 64, float32: 80%" in figures[0]


def test_sweeps_have_neither_limit_nor_errors() -> None:
    rows = [
        bench_rows.row(ms, p, share_of_limit=None, gbytes_per_s=None) for ms, p in ((1.0, "torchweld"), (3.0, "torch"))
    ]
    found = page.build(rows, ["here"], ["[layer_norm] the cpu kernels do not serve this call: it is Sunday"])
    assert "Rooflines" not in found.sections and "it is Sunday" in found.sections["Not timed"][0]
    assert ">3.00</td>" in found.html()


def test_several_machines_stay_apart() -> None:
    rows = [
        bench_rows.row(1.0),
        bench_rows.row(2.0, "torch"),
        bench_rows.row(5.0, device="B"),
        bench_rows.row(5.0, "torch", device="B"),
    ]
    found = page.build(rows, ["a.json", "b.json"]).html()
    assert "2 measurements on A CPU and B." in found and "from a.json and b.json" in found
    assert found.count('<td class="up3">2.00</td>') == 1 and found.count("<td>1.00</td>") == 1


# ---- compare


def compared(tmp_path: Path, old: list[report.Row], new: list[report.Row]) -> int:
    for name, rows in (("old", old), ("new", new)):
        report.write(rows, tmp_path / f"{name}.json")
    return main(["bench", "compare", str(tmp_path / "old.json"), str(tmp_path / "new.json")])


@pytest.mark.parametrize(
    ("new", "torch", "verdict"),
    [
        (1.5, 2.0, "slower"),
        (0.5, 2.0, "faster"),
        (1.03, 2.0, ""),  # percentiles overlap
        (1.5, 3.0, ""),  # the machine is slower for torch as well
        (1.0, 1.0, ""),  # torch alone became faster
        (0.5, 1.0, ""),
    ],
)
def test_compare_knows_noise_from_change(tmp_path: Path, new: float, torch: float, verdict: str, capsys: Any) -> None:
    old = [bench_rows.row(1.0), bench_rows.row(2.0, "torch")]
    code = compared(tmp_path, old, [bench_rows.row(new), bench_rows.row(torch, "torch")])
    assert code == (verdict == "slower")
    out = capsys.readouterr().out
    assert f"1 {verdict}" in out if verdict else "0 slower, 0 faster, 0 wrong" in out


def test_compare_without_torch_takes_the_times() -> None:
    (change,) = compare.compare([bench_rows.row(1.0)], [bench_rows.row(1.5)])
    assert (change.verdict, change.time, change.relative) == ("slower", 1.5, None)


def test_compare_names_what_became_wrong_and_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now = {"versions": {"torchweld": "1", "torch": "2.13.0", "threads": 2}}
    new = [bench_rows.wrong("layer_norm", "8192 x 768") | now]
    new[0]["case"] = bench_rows.row(1.0)["case"]
    assert compared(tmp_path, [bench_rows.row(1.0)], new) == 1
    out = capsys.readouterr().out
    assert "1 wrong" in out and "not the same, torchweld: 0 -> 1" in out and "torch:" not in out


def test_compare_refuses_what_it_cannot_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compared(tmp_path, [bench_rows.row(1.0)], [bench_rows.row(1.0, dtype="bfloat16")]) == 2
    assert "measurements of torchweld in common, but got none; make both" in capsys.readouterr().err
    both = [bench_rows.row(1.0), bench_rows.row(1.0, dtype="bfloat16"), bench_rows.row(1.0, dtype="float16")]
    assert compared(tmp_path, both, both[:1]) == 0
    assert f"not compared: 2 that only {tmp_path / 'old.json'} has" in capsys.readouterr().out.replace("\n", "")
    assert main(["bench", "compare", str(tmp_path / "old.json")]) == 2
    assert "expected two files of --json, OLD and NEW, but got 1" in capsys.readouterr().err


# ---- Files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"median_ms": None}, "row 1: median_ms: expected a positive number, but got None"),
        ({"p80_ms": True}, "row 1: p80_ms: expected a positive number, but got True"),
        ({"case": "8 x 64"}, "row 1: case: expected an object with a name, but got '8 x 64'"),
        ({"versions": None}, "row 1: versions: expected an object, but got None"),
        ({"op": 3}, "row 1: op: expected text, but got 3"),
        ({"share_of_limit": "all"}, "row 1: share_of_limit: expected a positive number or null, but got 'all'"),
        ({"max_error": "none"}, "row 1: max_error: expected a number or null, but got 'none'"),
    ],
)
def test_a_damaged_row_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([{**bench_rows.row(1.0), **change}]))
    with pytest.raises(UserError, match=re.escape(message)):
        report.read(tmp_path / "rows.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "rows.json"], "--from: expected what to write, but got none"),
        (["layer_norm", "--from", "rows.json", "--csv", "rows.csv"], "--from: expected no OP beside it"),
        (["--report", "report.txt"], "--report report.txt: expected a name that ends in .html"),
        (["--csv", "/no/such/folder/rows.csv"], "--csv /no/such/folder/rows.csv: expected a file in a folder"),
        (["--from", "none.json", "--csv", "rows.csv"], "none.json: No such file or directory; expected a file of"),
    ],
)
def test_options_that_do_not_fit(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"torchweld: error: {message}")


def test_csv_has_the_columns_of_liger(file: Path, tmp_path: Path) -> None:
    target = tmp_path / "rows.csv"
    assert main(["bench", "--csv", str(target), "--from", str(file)]) == 0
    with target.open(newline="") as lines:
        found = list(csv.DictReader(lines))
    rows = report.timed(report.read(file))
    assert tuple(found[0]) == csv_file.COLUMNS and len(found) == len(rows)
    # What Liger's benchmarks keep apart, so that none of the rows replaces another.
    key = (
        "kernel_name",
        "kernel_provider",
        "kernel_operation_mode",
        "x_value",
        "extra_benchmark_config_str",
        "gpu_name",
    )
    assert len({tuple(line[name] for name in key) for line in found}) == len(rows)
    for line, row in zip(found, rows, strict=True):
        assert json.loads(line["extra_benchmark_config_str"]) == {"dtype": row["dtype"]}
        assert [float(line[f"y_value_{q}"]) for q in (20, 50, 80)] == [row["p20_ms"], row["median_ms"], row["p80_ms"]]
        assert (line["x_value"], line["metric_name"], line["metric_unit"]) == (row["case"]["name"], "speed", "ms")
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", line["timestamp"])


@pytest.mark.parametrize("op", ACTIVATIONS)
def test_activations_have_the_same_rows_on_every_device(op: str) -> None:
    """What a row measures is made when it runs: a list of rows needs no GPU."""
    rows = [
        [(work.direction, work.dtype, work.case, work.bytes) for work in activations(op, Settings(device=device))]
        for device in ("cpu", "cuda")
    ]
    assert rows[0] == rows[1] and len(rows[0]) >= 4  # two directions in two dtypes
