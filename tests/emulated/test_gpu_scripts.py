"""What bench/gpu.sh runs, without a GPU: its Python on the emulated one at tiny sizes, its stages with stand-ins."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import bench_rows
from emulation import build
from torchweld.bench import report

BENCH = Path(__file__).parents[2] / "bench"
NAMES = ("wanted", "counters", "ab", "sanitize")
WANTED = [
    *(
        f"attention {way}, 1 x 1 x 70 x 64{kind}, bfloat16"
        for kind in ("", " causal")
        for way in ("forward", "backward")
    ),
    *(f"{op}_norm {way}, 5 x 96, bfloat16" for op in ("layer", "rms") for way in ("forward", "backward")),
    *(f"adamw step, one tensor, 1 tensors, {dtype}" for dtype in ("float32", "bfloat16")),
]


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield {name: importlib.import_module(name) for name in NAMES}
        for name in NAMES:
            del sys.modules[name]


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels as a file, for processes of their own, whose lines do not count."""
    if reason := build.unavailable():
        pytest.skip(f"the CUDA kernels cannot be built for the CPU: {reason}")
    monkeypatch.setenv("GCOV_PREFIX", str(tmp_path / "counts"))
    return str(build.library())


# ---- The most wanted timings


@pytest.mark.slow
def test_wanted_timings_are_rows_of_a_file(
    scripts: dict[str, Any], library: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    options = ["--device", "cpu", "--kernels", library, "--tiny", "--seconds", "0.001", "--limit", "100"]
    assert scripts["wanted"].main([*options, "--json", str(file)]) == 0
    rows = report.read(file)
    ours = [row for row in rows if row["provider"] == "torchweld"]
    assert [f"{r['op']} {r['direction']}, {r['case']['name']}, {r['dtype']}" for r in ours] == WANTED
    assert all(row["median_ms"] > 0 for row in rows) and all(row["max_error"] is not None for row in ours)
    assert len(capfd.readouterr().out.splitlines()) == len(rows)
    assert scripts["wanted"].main([*options, "--json", str(file), "rms_norm forward"]) == 0
    assert len(report.read(file)) == len(rows) + 2  # of torchweld and torch, after those of the first run


def test_wanted_sizes(scripts: dict[str, Any]) -> None:
    """One length and width of everything comes first; all of what is wanted is there."""
    wanted = scripts["wanted"]
    works = list(wanted.works(wanted.FULL, wanted.Settings(device="cpu")))
    names = [wanted.name_of(work) for work in works]
    assert len(set(names)) == len(names)
    first = names[:18]
    assert first[0] == "attention forward, 4 x 16 x 4096 x 128, bfloat16" and first[-1].startswith("adamw step")
    sizes = {(w.case["keys"], w.case["dim"], w.case["causal"], w.direction) for w in works if w.op == "attention"}
    assert len(sizes) == 3 * 3 * 2 * 2
    assert {w.case["cols"] for w in works if w.op == "layer_norm"} == {768, 4096, 8192}
    assert {w.case["parameters"] for w in works if w.op == "adamw"} == {10**9}


PROGRAM = """
import json, os, sys, time
def say(**message): print(json.dumps(message), flush=True)
row = json.loads(ROW)
start = int(sys.argv[sys.argv.index("--from") + 1])
print("a library's own words")
for number, name in enumerate(["right", "hangs", "dies", "unusable", "wrong", "refused", "last"]):
    if number < start: continue
    say(begins=number, name=name)
    if name == "hangs": time.sleep(60)
    if name == "dies": os._exit(7)
    if name == "unusable": say(fails="error: an illegal memory access"); sys.exit(3)
    if name == "refused": say(note="not timed: a reason"); continue
    say(rows=[{**row, "wrong": "off by 1"} if name == "wrong" else row])
"""


def test_what_fails_is_named_and_the_next_is_measured(scripts: dict[str, Any], tmp_path: Path) -> None:
    row = json.dumps(bench_rows.row(1.0))
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("ROW", repr(row)))
    file, out = StringIO(), StringIO()
    assert scripts["wanted"].watch([sys.executable, str(program)], file, 3, out) == 4
    said = out.getvalue()
    for line in ("hangs: hangs, nothing for 3 s", "dies: exit code 7", "unusable: error: an illegal memory access",
                 "layer_norm forward, 8192 x 768: WRONG, off by 1", "refused: not timed: a reason"):  # fmt: skip
        assert line in said.splitlines()
    assert len(file.getvalue().splitlines()) == 3  # right, wrong, last
    program.write_text("import sys; sys.exit('no torchweld')")
    assert scripts["wanted"].watch([sys.executable, str(program)], None, 30, out) == 1


# ---- Counters

ATTENTION = "void torchweld::cuda::attention::sm90::forward<__nv_bfloat16, 64>(torchweld::cuda::P)"
NCU = f"""==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Context","Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","{ATTENTION}","1","S","Duration","ms","1,234.5"
"0","7","{ATTENTION}","1","S","DRAM Throughput","%","12.5"
"0","7","{ATTENTION}","1","C",\
"sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active","%","71.1"
"1","7","void torchweld::cuda::norm::(anonymous namespace)::rows<float>(int)","1","S","Duration","us","8.2"
==PROF== Disconnected
"""
NSYS = """Processing [report.sqlite] with [cuda_gpu_kern_sum.py]...

Time (%),Total Time (ns),Instances,Avg (ns),Med (ns),Min (ns),Max (ns),StdDev (ns),Name
75.0,30000,2,15000.0,15000.0,14000,16000,1.0,"void torchweld::cuda::norm::<unnamed>::rows<float, (int)8>(int)"
"""


def test_what_profilers_print(scripts: dict[str, Any], tmp_path: Path) -> None:
    counters = scripts["counters"]
    attention, norm = counters.read_ncu(NCU, tmp_path)
    assert attention["kernel"] == "attention::sm90::forward<__nv_bfloat16, 64>"
    assert (attention["us"], attention["DRAM %"], attention["xu %"]) == ("1234500.0", "12.5", "71.1")
    assert (norm["kernel"], norm["us"], norm["DRAM %"]) == ("norm::rows<float>", "8.2", "")
    assert counters.read_ncu("==ERROR== permission denied", tmp_path) == []
    (summed,) = counters.read_nsys(NSYS, tmp_path)
    assert summed["us"] == "15.0" and summed["kernel"].startswith("norm::rows<float")
    events = [{"cat": "cpu_op", "name": "x", "dur": 1}, {"cat": "kernel", "name": "void f(int)", "dur": 3.25,
              "args": {"registers per thread": 168, "est. achieved occupancy %": 19}}]  # fmt: skip
    (tmp_path / "trace-torchweld.json").write_text(json.dumps({"traceEvents": events}))
    (seen,) = counters.read_trace("", tmp_path)
    assert seen == {"kernel": "f", "us": "3.2", "warps %": "19", "registers": "168"}


@pytest.mark.slow
def test_counters_fall_back_and_say_what_is_missing(
    scripts: dict[str, Any],
    library: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Beside an ncu that may not read counters. The emulated GPU has no kernels that torch's profiler could see."""
    ncu = tmp_path / "bin/ncu"
    ncu.parent.mkdir()
    ncu.write_text("#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM: no permission'; exit 1\n")
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ncu.parent}:{os.environ['PATH']}")
    options = ["--device", "cpu", "--kernels", library, "--tiny", "--out", str(tmp_path / "out")]
    assert scripts["counters"].main([*options, "layer_norm forward"]) == 1
    said = capfd.readouterr().out
    assert "profilers here: ncu, torch; not on PATH: nsys" in said
    assert "ncu: no kernels seen, exit code 1: ==ERROR== ERR_NVGPUCTRPERM: no permission; the next is torch" in said
    assert "torch: no kernels seen, exit code 0" in said and "torch does not show: tensor" in said
    (trace,) = (tmp_path / "out/00").glob("trace-*.json")
    assert json.loads(trace.read_text())["traceEvents"]


# ---- Two variants


def test_ratio_and_noise(scripts: dict[str, Any]) -> None:
    result = scripts["ab"].result
    slower = result([(1.0, 1.2, 1.0, 1.2), (2.0, 2.4, 2.0, 2.4), (1.0, 9.0, 1.0, 9.0)])  # a round that was disturbed
    assert slower.ratio == pytest.approx(1.2) and slower.noise == 0 and slower.verdict == "B is slower"
    assert (slower.a, slower.b) == (1.0, pytest.approx(2.4))
    assert result([(1.0, 0.9, 1.0, 0.9)] * 3).verdict == "B is faster"
    noisy = result([(1.0, 1.3, 1.4, 1.3)] * 3)
    assert noisy.noise == pytest.approx(1 / 3) and noisy.verdict == "within the noise"
    assert result([(1.0, 1.0, 1.0, 1.5)] * 3).noise == pytest.approx(0.4)


@pytest.mark.slow
def test_variants_beside_each_other(
    scripts: dict[str, Any], library: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A module, and a folder with the package, which has this CPU's own kernels."""
    package = Path(scripts["ab"].torchweld.__file__).parent
    (tmp_path / "torchweld").symlink_to(package)
    options = ["--device", "cpu", "--tiny", "--rounds", "3", "--part", "layer_norm backward", "adamw"]
    assert scripts["ab"].main([library, str(tmp_path), *options]) == 0
    a, b, _, *rows = capfd.readouterr().out.splitlines()
    assert a.startswith("A: ") and a.endswith(library) and b.startswith(f"B: package {tmp_path}/torchweld")
    assert [row.split("  ")[0] for row in rows] == [
        name for name in WANTED if "layer_norm back" in name or "adam" in name
    ]
    assert all(float(number) > 0 for row in rows for number in row.split("  ", 1)[1].split()[:3])


def test_variants_that_are_none(scripts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, problem in (
        ([], "expected two variants, A and B, but got 0"),
        ([str(tmp_path), str(tmp_path)], "expected a compiled module, or a folder with torchweld in it"),
    ):
        with pytest.raises(SystemExit):
            scripts["ab"].main(arguments)
        assert problem in capsys.readouterr().err


# ---- What the sanitizers run


def test_every_kernel_family_for_the_sanitizers(
    scripts: dict[str, Any], emulated: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scripts["sanitize"], "COLUMNS", (257,))
    try:
        scripts["sanitize"].main(["--device", "cpu", "--dtypes", "bfloat16", "--dims", "32"])
    finally:
        torch.set_default_device(None)
    ran = capsys.readouterr().out.splitlines()
    assert ran == [f"{name}, bfloat16: ran" for name in ("attention", "norm", "optimizer", "elementwise")]


# ---- The stages

PYTHON = r"""#!/bin/sh
echo "$*" >> "$CALLS"
case "$*" in
  *get_device_name*) echo "a-gpu" ;;
  *smoke.py*) echo "9 of 9 families are right" ;;
  *"-m pytest"*"-m cuda"*) echo "3 failed"; exit 1 ;;
esac
"""


@pytest.fixture
def gpu_sh(tmp_path: Path) -> Any:
    """The script with stand-ins for python and the toolkit. Returns its exit code, what it printed and its calls."""
    (tmp_path / "bench").mkdir()
    shutil.copy(BENCH / "gpu.sh", tmp_path / "bench")
    for name in ("csrc", "python", "tests", "bin"):
        (tmp_path / name).mkdir()
    for name in ("CMakeLists.txt", "pyproject.toml", "csrc/a.cu"):
        (tmp_path / name).touch()
    tools = {"python": PYTHON, **dict.fromkeys(("nvidia-smi", "nvcc", "cmake", "ninja"), '#!/bin/sh\necho "$0 $*"\n')}
    for name, text in tools.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "PYTHON": f"{tmp_path}/bin/python",
                                "CALLS": str(tmp_path / "calls"), "GPU_OUT": str(tmp_path / "out")}  # fmt: skip

    def run(*arguments: str) -> tuple[int, str, list[str]]:
        (tmp_path / "calls").write_text("")
        found = subprocess.run(
            [tmp_path / "bench/gpu.sh", *arguments], env=environment, capture_output=True, text=True, check=False
        )
        return found.returncode, found.stdout + found.stderr, (tmp_path / "calls").read_text().splitlines()

    return run


def test_stages_run_in_their_order(gpu_sh: Any, tmp_path: Path) -> None:
    code, said, calls = gpu_sh()
    assert code == 1
    wanted = ("-m pip install", "bench/smoke.py", "bench/wanted.py --json bench/results/a-gpu-wanted.jsonl",
              "tests -m cuda", "tests/emulated/test_machine_code.py")  # fmt: skip
    places = [next(i for i, call in enumerate(calls) if each in call) for each in wanted]
    assert places == sorted(places)
    assert "9 of 9 families are right" in said and "test       FAILED" in said and "3 failed" in said
    assert {"build.log", "smoke.log", "wanted.log", "test.log", "code.log", "results"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    code, said, calls = gpu_sh()  # again: what passed on these sources is not run again
    assert code == 1 and said.count("passed before") == 4 and not any("smoke.py" in call for call in calls)
    code, said, calls = gpu_sh("smoke")
    assert code == 0 and any("smoke.py" in call for call in calls)
    (tmp_path / "csrc/a.cu").write_text("changed")
    assert any("pip install" in call for call in gpu_sh("wanted")[2])


def test_the_other_two_modes(gpu_sh: Any, tmp_path: Path) -> None:
    code, said, calls = gpu_sh("counters")
    assert any("bench/counters.py" in call for call in calls)
    assert code == 1 and said.count("compute-sanitizer is not on PATH") == 4
    checkout, package = tmp_path / "checkout", tmp_path / "package"
    (checkout / "python/torchweld").mkdir(parents=True)
    (checkout / "CMakeLists.txt").touch()
    package.mkdir()
    code, said, calls = gpu_sh("compare", str(checkout), str(package), "--rounds", "5")
    assert code == 0
    (call,) = (each for each in calls if "bench/ab.py" in each)
    built = Path(call.split()[1])
    assert (tmp_path / built / "torchweld").is_dir() and call.split()[2:] == [str(package), "--rounds", "5"]
    assert gpu_sh("compare", "one")[0] == 2
    assert "expected a stage, counters or compare, but got nothing" in gpu_sh("nothing")[1]
