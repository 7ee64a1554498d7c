"""The command line: what it prints, what it returns, and one line for what it cannot do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fresh
from torchweld import _cpu, backend, ops, testing
from torchweld.bench import command, harness, report, sweep
from torchweld.bench.functional import works
from torchweld.bench.harness import Settings, Work, interleave, measure
from torchweld.cli import check, main

KEYS = {
    *("op", "direction", "provider", "device", "dtype", "case", "median_ms", "p20_ms", "p80_ms", "gflops"),
    *("gbytes_per_s", "share_of_limit", "speedup_vs_torch", "max_error", "torch_max_error", "versions"),
}


def launch(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    program = f"import sys; from torchweld.cli import command; sys.argv = ['torchweld', *{arguments}]; command()"
    return fresh.python(program, **environment)


# ---- Bad input: exit code 2, one line, no traceback.


@pytest.mark.parametrize(
    "arguments",
    [
        ["bogus"],
        [],
        ["info", "--bogus"],
        ["bench", "nope"],
        ["bench", "--threads", "0"],
        ["bench", "--threads", "two"],
        ["bench", "--dtype", "float8"],
        ["bench", "--json", "/no/such/folder/rows.json"],
        ["bench", "--plot", "rows.doc"],
        ["bench", "--markdown", "/no/such/file"],
        ["check", "--isa", "mmx"],
        ["check", "--op", "nope"],
        ["check", "extra"],
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line_and_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(arguments)
    except SystemExit as exit:  # argparse's own way out
        code = int(exit.code or 0)
    out, err = capsys.readouterr()
    assert code == 2
    assert not out and err.startswith("torchweld: error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"TORCHWELD_BACKEND": "tpu"}, "TORCHWELD_BACKEND: unknown backend 'tpu'; expected one of"),
        ({"TORCHWELD_CPU_ISA": "mmx"}, "TORCHWELD_CPU_ISA: unknown instruction set 'mmx'; this machine can use"),
    ],
)
def test_a_bad_environment_is_one_line_and_2(environment: dict[str, str], message: str) -> None:
    result = launch("info", **environment)
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.startswith(f"torchweld: error: {message}") and result.stderr.count("\n") == 1


@pytest.mark.skipif(backend.unavailable("cuda") is None, reason="there are CUDA kernels here")
def test_a_device_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == f"torchweld: error: --device cuda: {backend.unavailable('cuda')}\n"


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("torchweld.cli.info.run", interrupted)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "torchweld: interrupted\n"


def test_a_reader_that_leaves_is_no_error() -> None:
    program = (
        "import sys, torchweld.cli as c; from torchweld.cli import info; info.run = lambda _: print('x' * 10**6) or 0"
    )
    command = [sys.executable, "-c", f"{program}; sys.exit(c.main(['info']))"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 141


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in ((["--help"], ["info", "check", "bench", "train", "generate"]), (["--version"], ["0."])):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        out = capsys.readouterr().out
        assert exit.value.code == 0 and all(word in out for word in expected)


# ---- info


def test_info_says_what_runs_and_why_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["cpu"]["isa"] == _cpu.isa() and set(found["cpu"]["isas_available"]) <= set(found["cpu"]["isas_built"])
    assert found["cuda"]["unavailable"] == backend.unavailable("cuda")
    assert found["ops"]["cpu"]["layer_norm"] == {"backend": "cpu", "why": None}

    def refusing(*_: object) -> str:
        raise backend.NotServedError("layer_norm", "cpu", "it is Sunday")

    monkeypatch.setattr(ops, "layer_norm", refusing)
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "reference: it is Sunday" in out and (backend.unavailable("cuda") or "cuda").split()[0] in out


# ---- check


@pytest.mark.slow
def test_check_holds_every_instruction_set_to_the_rule(capsys: pytest.CaptureFixture[str]) -> None:
    before = _cpu.isa()
    assert main(["check", "--op", "layer_norm"]) == 0
    out = capsys.readouterr().out
    assert all(f"cpu {isa} " in out for isa in _cpu.available_isas()) and "all results within the rule" in out
    assert _cpu.isa() == before


def test_check_is_1_where_a_kernel_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = ops.layer_norm
    monkeypatch.setattr(ops, "layer_norm", lambda x, *rest: right(x, *rest) * 1.01)
    monkeypatch.setattr(testing, "cases", lambda op: testing.ops()[op][:3])
    assert main(["check", "--op", "layer_norm", "--isa", "baseline"]) == 1
    assert "[layer_norm] cpu baseline float32: 8 x 64, output: max|ours - fp64|" in capsys.readouterr().out


def test_check_reports_a_kernel_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(testing, "cases", lambda op: testing.ops()[op][:1])
    monkeypatch.setattr(ops, "layer_norm", broken)
    lines = check.check_op("layer_norm", check.targets("baseline"))
    misses = lines["cpu baseline", "float32"].misses
    assert misses and misses[0].endswith("RuntimeError: no such kernel")


# ---- bench


@pytest.mark.slow
def test_bench_writes_rows_with_the_promised_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "rows.json", tmp_path / "rows.svg"
    arguments = ["bench", "layer_norm", "--quick", "--dtype", "float32", "--json", str(file)]
    assert main([*arguments, "--plot", str(picture)]) == 0
    rows = json.loads(file.read_text())
    assert [(r["direction"], r["provider"]) for r in rows] == [
        (direction, provider) for direction in ("forward", "backward") for provider in ("torchweld", "torch")
    ]
    for row in rows:
        assert set(row) == KEYS == set(report.KEYS)
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["gflops"] is None and row["gbytes_per_s"] > 0 and row["share_of_limit"] > 0
        assert row["case"] == {"name": "8192 x 768", "rows": 8192, "cols": 768}
        assert 0 < row["max_error"] < 1e-2
    assert rows[1]["speedup_vs_torch"] == 1.0
    assert picture.read_text().lstrip().startswith("<?xml")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.json", "rows.svg"]

    capsys.readouterr()
    assert main(["bench", "--markdown", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[2].startswith("| layer_norm forward: 8192 x 768 | float32 |")


def test_bench_does_not_time_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = ops.layer_norm
    monkeypatch.setattr(ops, "layer_norm", lambda x, *rest: right(x, *rest) * 1.01)
    arguments = ["bench", "layer_norm", "--quick", "--dtype", "float32", "--direction", "forward"]
    assert main([*arguments, *("--json", str(tmp_path / "rows.json"), "--report", str(tmp_path / "report.html"))]) == 1
    assert "wrong, not timed: [layer_norm] case '8192 x 768', output" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["median_ms"] is None and row["wrong"].startswith("[layer_norm] case '8192 x 768', output")
    assert "1 result broke the accuracy rule" in (tmp_path / "report.html").read_text()
    assert report.markdown(report.read(tmp_path / "rows.json")).count("\n") == 1


def test_a_plot_without_matplotlib_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "layer_norm", "--plot", "rows.png"]) == 2
    assert "pip install 'torchweld[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[1]", '[{"op": "layer_norm"}]'])
def test_a_foreign_file_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.json").write_text(text)
    assert main(["bench", "--markdown", str(tmp_path / "rows.json")]) == 2
    assert "rows.json: " in capsys.readouterr().err


def test_providers_are_timed_side_by_side() -> None:
    order: list[str] = []
    calls: dict[str, Any] = {name: lambda name=name: order.append(name) for name in "abc"}
    samples = interleave(calls, lambda call, _: float(call() is None), 0.0)
    assert order[-15:] == [*"abc", *"bca", *"cab", *"abc", *"bca"]
    assert {name: len(each) for name, each in samples.items()} == dict.fromkeys("abc", 5)


def test_rates_follow_from_the_amount_and_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"ours": 2.0, "theirs": 4.0, "limit": 1.0}
    monkeypatch.setattr(harness, "interleave", lambda calls, *_: {n: [times.get(n, 4.0)] * 5 for n in calls})
    work = Work("op", "forward", torch.float32, {"name": "c"}, lambda: {"ours": list, "torch": list}, bytes=2e6)
    ours, theirs = measure(work, Settings())
    assert (ours["gbytes_per_s"], ours["share_of_limit"], ours["speedup_vs_torch"]) == (1.0, 0.5, 2.0)
    assert (theirs["gbytes_per_s"], theirs["share_of_limit"]) == (0.5, 0.25)


@pytest.mark.slow
def test_every_source_has_works(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(dtypes=(torch.float32,), quick=True)
    for name, source in command.sources().items():
        work = next(iter(source(settings)))
        assert work.case["name"] and name in (work.op, "overhead")


def test_a_kernel_that_torch_does_not_have_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    def absent(_: object) -> Any:
        raise RuntimeError("No available kernel. Aborting execution.")

    case, settings = testing.cases("layer_norm")[0], Settings(directions=("forward",), seconds=0.0)
    (work,) = works(case, {"name": case.name}, torch.float32, settings, {"forward": {}}, **{"torch:none": absent})
    assert [row["provider"] for row in measure(work, settings)] == ["torchweld", "torch"]
    assert "torch:none is not timed for layer_norm 8 x 64: No available kernel" in caplog.text


def test_bench_does_not_time_the_reference(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refusing(*_: object) -> torch.Tensor:
        raise backend.NotServedError("layer_norm", "cpu", "it is Sunday")

    monkeypatch.setattr(ops, "layer_norm", refusing)
    assert main(["bench", "layer_norm", "--quick"]) == 0
    out = capsys.readouterr().out
    assert out.count("not timed: [layer_norm] the cpu kernels do not serve this call: it is Sunday") == 1


def test_sweep_sums_up_its_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sweep, "ROWS", ((1, 8), (2, 4)))
    monkeypatch.setattr(sweep, "LOGITS", ((3, 5),))
    monkeypatch.setattr(sweep, "HEADS", ((1, 2, 3, 4, 8), (1, 1, 4, 4, 8)))
    monkeypatch.setattr(sweep, "LISTS", ((2, 3),))
    monkeypatch.setattr(sweep, "SAMPLE", 1e-6)
    monkeypatch.setattr(sweep, "SHARE", 10**6)
    rows, picture = tmp_path / "rows.json", tmp_path / "map.png"
    arguments = ["bench", "sweep", "--quick", "--dtype", "float32", "--json", str(rows), "--plot", str(picture)]
    assert main(arguments) == 0
    found = report.read(rows)
    kinds = {(row["op"], row["direction"]) for row in found}
    norms = {"layer_norm", "rms_norm", "gelu tanh", "gelu none", "cross_entropy", "attention"}
    assert {(op, direction) for op in norms for direction in ("forward", "training")} <= kinds
    assert {("AdamW", "step"), ("SGD", "step"), ("attention, causal", "training")} <= kinds
    assert len(found) == 2 * (2 * (2 * 4 + 1 + 2 * 2 + 1) + 2)
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "x torch" in printed and "gelu none" in printed
    assert main(["bench", "sweep", "layer_norm"]) == 2
    assert "or sweep alone, but got 'sweep'" in capsys.readouterr().err
