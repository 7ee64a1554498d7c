"""What the hardware's counters say of our main kernels, by the best profiler that this machine has.

    python bench/counters.py [--out FOLDER] [--limit 60] [--with ncu|nsys|torch] [PART ...]

`ncu` reads the counters (share of peak of each unit, issue slots, occupancy); `nsys` and torch's own profiler (CUPTI)
have times and registers only, and the last line says what is missing. Each measurement of wanted.py at one length runs
in a process of its own, and its kernels are printed when it ends. Whole reports are left in the folder.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import wanted

from torchweld.bench.harness import Settings

# Columns by what ncu calls a metric. Names differ between versions and chips: the first that is there is shown.
COUNTERS: dict[str, tuple[str, ...]] = {
    "us": ("Duration", "gpu__time_duration.sum"),
    "SM %": ("Compute (SM) Throughput", "SM [%]"),
    "tensor %": (
        "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
        "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    ),
    "issue %": ("Issue Slots Busy", "sm__inst_issued.avg.pct_of_peak_sustained_active"),
    "xu %": ("sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",),
    "shared %": ("l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed",),
    "L2 %": ("L2 Cache Throughput", "lts__t_sectors.avg.pct_of_peak_sustained_elapsed"),
    "DRAM %": ("DRAM Throughput", "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed"),
    "warps %": ("Achieved Occupancy",),
    "registers": ("Registers Per Thread", "launch__registers_per_thread"),
}
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats")
METRICS = [name for names in COUNTERS.values() for name in names if "__" in name]

HANGS = "hangs, or takes more than"
Kernel = dict[str, str]  # columns of the table, and "kernel"


class Profiler(NamedTuple):
    """`commands` are tried in turn, until one gives kernels; `read` finds them in the folder or the output."""

    commands: Callable[[list[str], Path], list[list[str]]]
    read: Callable[[str, Path], list[Kernel]]
    lacks: str


# ---- The process that is watched


def target(part: str, tiny: bool, device: str, trace: Path | None) -> int:
    """Calls ours three times; the last call is what a profiler sees."""
    settings = Settings(device=device)
    work = wanted.find(part, wanted.TINY if tiny else wanted.FULL, settings)
    for provider, call in work.calls().items():
        if not provider.startswith("torchweld"):
            continue
        for _ in range(2):
            call()
        if trace is not None:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if device == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            with torch.profiler.profile(activities=activities) as profile:
                call()
                if device == "cuda":
                    torch.cuda.synchronize()
            profile.export_chrome_trace(str(trace.with_name(f"{trace.stem}-{provider.replace(':', '-')}.json")))
        else:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
    return 0


# ---- Profilers


def ncu_commands(command: list[str], folder: Path) -> list[list[str]]:
    """With the metrics of each unit, then without those that this chip may not have. The clocks are left alone."""
    common = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "details"]
    sections = [word for name in SECTIONS for word in ("--section", name)]
    return [[*common, *sections, "--metrics", ",".join(METRICS), *command], [*common, *sections, *command]]


def short(name: str) -> str:
    """A kernel's name without its arguments' types and without namespaces above the family."""
    return re.sub(r"^void |\(anonymous namespace\)::|<unnamed>::|torchweld::cuda::|\((?!anonymous).*$", "", name)


def read_ncu(output: str, _: Path) -> list[Kernel]:
    """From the lines of CSV among what ncu and the program print: a line for each kernel and metric."""
    text = output.splitlines()
    first = next((i for i, line in enumerate(text) if '"Metric Name"' in line), None)
    if first is None:
        return []
    found: dict[str, dict[str, tuple[str, str]]] = {}
    names: dict[str, str] = {}
    for row in csv.DictReader(line for line in text[first:] if line.startswith('"')):
        names[row["ID"]] = short(row["Kernel Name"])
        found.setdefault(row["ID"], {})[row["Metric Name"]] = (row["Metric Value"], row["Metric Unit"])
    kernels = []
    for number, metrics in found.items():
        kernel = {"kernel": names[number]}
        for column, wanted_names in COUNTERS.items():
            value, unit = next((metrics[n] for n in wanted_names if n in metrics), ("", ""))
            kernel[column] = _microseconds(value, unit) if column == "us" else value
        kernels.append(kernel)
    return kernels


def _microseconds(value: str, unit: str) -> str:
    factor = {"n": 1e-3, "u": 1.0, "m": 1e3}.get(unit[:1]) if unit.endswith(("s", "second")) else None
    return f"{value} {unit}".strip() if factor is None else f"{float(value.replace(',', '')) * factor:.1f}"


def nsys_commands(command: list[str], folder: Path) -> list[list[str]]:
    report = f"{folder / 'report'}.nsys-rep"
    profile = ["nsys", "profile", "--trace", "cuda", "--capture-range", "cudaProfilerApi", "--force-overwrite", "true"]
    stats = ["nsys", "stats", "--report", "cuda_gpu_kern_sum", "--format", "csv", "--force-export", "true"]
    return [["bash", "-c", f"{shlex.join([*profile, '-o', report, *command])} && {shlex.join([*stats, report])}"]]


def read_nsys(output: str, _: Path) -> list[Kernel]:
    text = output.splitlines()
    first = next((i for i, line in enumerate(text) if "Total Time (ns)" in line and "Name" in line), None)
    rows = csv.DictReader(text[first:]) if first is not None else ()
    return [
        {"kernel": short(row["Name"]), "us": f"{float(row['Total Time (ns)']) / int(row['Instances']) / 1e3:.1f}"}
        for row in rows
        if row.get("Instances", "").isdigit() and row.get("Name")
    ]


def torch_commands(command: list[str], folder: Path) -> list[list[str]]:
    return [[*command, "--trace", str(folder / "trace.json")]]


def read_trace(_: str, folder: Path) -> list[Kernel]:
    kernels = []
    for path in sorted(folder.glob("trace*.json")):
        for event in json.loads(path.read_text(encoding="utf-8"))["traceEvents"]:
            if event.get("cat") == "kernel":
                about = event.get("args", {})
                kernels.append(
                    {
                        "kernel": short(event["name"]),
                        "us": f"{event['dur']:.1f}",
                        "warps %": str(about.get("est. achieved occupancy %", "")),
                        "registers": str(about.get("registers per thread", "")),
                    }
                )
    return kernels


_TIMES_ONLY = "tensor, issue, xu, shared, L2 and DRAM shares (they need ncu, and permission to read counters)"
PROFILERS = {
    "ncu": Profiler(ncu_commands, read_ncu, ""),
    "nsys": Profiler(nsys_commands, read_nsys, f"occupancy, registers, {_TIMES_ONLY}"),
    "torch": Profiler(torch_commands, read_trace, _TIMES_ONLY),
}


def installed() -> list[str]:
    return [name for name in PROFILERS if name == "torch" or shutil.which(name)]


def profile(command: list[str], profiler: Profiler, folder: Path, seconds: float) -> tuple[list[Kernel], str]:
    """The kernels of one measurement; or none, and what became of it. Keeps what was printed."""
    problem = "nothing to run"
    for number, words in enumerate(profiler.commands(command, folder)):
        try:
            run = subprocess.run(words, capture_output=True, text=True, timeout=seconds, check=False)
        except FileNotFoundError:
            return [], f"{words[0]} is not on PATH"
        except subprocess.TimeoutExpired:
            return [], f"{HANGS} {seconds:g} s"
        (folder / f"output{number}.txt").write_text(run.stdout + run.stderr, encoding="utf-8")
        if kernels := profiler.read(run.stdout, folder):
            return kernels, ""
        said = [line for line in (run.stderr + "\n" + run.stdout).splitlines() if line.strip()]
        errors = [line for line in said if "error" in line.lower()]
        problem = f"no kernels seen, exit code {run.returncode}: {(errors or said or ['nothing printed'])[-1].strip()}"
    return [], problem


def table(kernels: list[Kernel], columns: list[str]) -> Iterator[str]:
    for kernel in kernels:
        yield f"  {kernel['kernel'][:64]:<64} " + " ".join(f"{kernel.get(c, '') or '-':>9}" for c in columns)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="parts of names (default: one size of each)")
    parser.add_argument("--out", type=Path, default=Path("build/gpu/counters"), help="default: %(default)s")
    parser.add_argument("--limit", type=float, default=60, help="seconds for each measurement (default: %(default)s)")
    parser.add_argument("--with", choices=PROFILERS, dest="profiler", help="default: the first that is installed")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kernels", type=Path, metavar="FILE", help="this compiled module, not the installed one")
    parser.add_argument("--tiny", action="store_true", help="sizes for an emulator")
    parser.add_argument("--call", metavar="NAME", help="run this measurement's calls here, for a profiler")
    parser.add_argument("--trace", type=Path, help="with --call: by torch's profiler, into files with this beginning")
    options = parser.parse_args(arguments)
    if options.call is not None:
        if options.kernels is not None:
            wanted.use_kernels(options.kernels, options.device)
        return target(options.call, options.tiny, options.device, options.trace)
    names = measurements(options)
    profilers = [options.profiler] if options.profiler else installed()
    missing = [name for name in PROFILERS if name not in installed()]
    print(f"profilers here: {', '.join(installed())}; not on PATH: {', '.join(missing) or 'none'}")
    columns, failed = list(COUNTERS), 0
    print(f"  {'kernel':<64} " + " ".join(f"{c:>9}" for c in columns), flush=True)
    for number, name in enumerate(names):
        command = [sys.executable, __file__, "--device", options.device, "--call", name]
        command += ["--tiny"] if options.tiny else []
        command += ["--kernels", str(options.kernels)] if options.kernels is not None else []
        folder = options.out / f"{number:02}"
        print(f"{name}", flush=True)
        kernels: list[Kernel] = []
        while profilers and not kernels:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            kernels, problem = profile(command, PROFILERS[profilers[0]], folder, options.limit)
            if kernels or len(profilers) == 1 or problem.startswith(HANGS):
                break
            print(f"  {profilers[0]}: {problem}; the next is {profilers[1]}", flush=True)
            profilers = profilers[1:]  # one that reads nothing here reads nothing of the next
        for line in table(kernels, columns):
            print(line, flush=True)
        if not kernels:
            failed += 1
            print(f"  {profilers[0]}: {problem}", flush=True)
    if lacks := PROFILERS[profilers[0]].lacks:
        print(f"{profilers[0]} does not show: {lacks}")
    return int(failed > 0)


def measurements(options: Any) -> list[str]:
    sizes = wanted.TINY if options.tiny else wanted.FULL
    few = sizes._replace(lengths=sizes.lengths[:1], cols=sizes.cols[:1])
    names = [wanted.name_of(work) for work in wanted.works(few, Settings(device=options.device))]
    return [n for n in names if "causal" not in n and (not options.parts or any(part in n for part in options.parts))]


if __name__ == "__main__":
    sys.exit(main())
