"""The fuzzer: finds nothing in a short run, finds what was planted, and prints programs that reproduce it."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import fresh
from torchweld import _cpu, backend, ops
from torchweld.testing import cases
from torchweld.testing.fuzz import __main__ as command
from torchweld.testing.fuzz import hostile, worker
from torchweld.testing.fuzz.draw import Draw
from torchweld.testing.fuzz.edges import SIDES, at_edge, flat
from torchweld.testing.fuzz.families import FAMILIES
from torchweld.testing.fuzz.hostile import Hostile, small_cases
from torchweld.testing.fuzz.lockstep import EVENTS, Lockstep
from torchweld.testing.fuzz.trial import Judged, Skip, Trial, program, signature, source
from torchweld.testing.gelu import GeluCase

# What a child imports before anything else: a gelu with a fault.
PLANTED = """
import os, time
from torchweld import ops
right = ops.gelu
def wrong(x, approximate="none"):
    if x.numel() > 20 and os.environ.get("PLANTED"):
        {"wrong": lambda: None, "abort": os.abort, "hang": lambda: time.sleep(1000)}[os.environ["PLANTED"]]()
        return right(x, approximate) * 1.01
    return right(x, approximate)
ops.gelu = wrong
"""
ISA = _cpu.available_isas()[-1]


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(PLANTED)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))


# The function with torch's signature is for the command alone. The number of cases is fixed, so that
# every machine draws the same.
CLEAN = [
    "attention",
    "decoding",
    "packed_attention",
    "paged_attention",
    "norms",
    "dropout",
    "gelu",
    "gated",
    "rotary_embedding",
    "cross_entropy",
    "linear_cross_entropy",
    "adamw",
    "sgd",
    "hostile",
    "optimizers",
]


@pytest.mark.slow
def test_nothing_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    code = command.main([*CLEAN, "edges", "--cases", "25", "--seed", "1"])
    found = capsys.readouterr().out
    assert code == 0 and "no findings" in found, found[-8000:]
    for word in (*_cpu.available_isas(), *CLEAN):
        assert word in found


def plain(trial: Trial) -> bool:
    case = getattr(trial, "case", None)
    return isinstance(case, GeluCase) and case.shape[0] > 20 and (case.scale, case.values) == (2.0, "normal")


@pytest.mark.slow
@pytest.mark.usefixtures("planted")
@pytest.mark.parametrize(
    ("fault", "kind"), [("wrong", "output misses the rule"), ("abort", "SIGABRT"), ("hang", "no end in 2 s")]
)
def test_a_planted_fault_is_found_and_its_program_reproduces_it(
    fault: str, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PLANTED", fault)
    monkeypatch.setattr(command, "_HANGS", 2.0 if fault == "hang" else 60.0)
    number = next(n for n in range(100) if plain(FAMILIES["gelu"](Draw(0, n, "gelu"))))
    assert command.main(["gelu", "--case", str(number), "--isa", ISA]) == 1
    found = capsys.readouterr().out
    assert f"gelu {number} on {ISA}: {kind}" in found
    comment, text = found.split("\n# ", 1)[1].split("\n", 1)
    assert comment == f"python -m torchweld.testing.fuzz gelu --seed 0 --case {number} --isa {ISA}"
    text = text.split("oracle.check()")[0] + "oracle.check()\n"
    assert 5 <= len(text.splitlines()) <= 9
    if fault != "hang":
        assert subprocess.run([sys.executable, "-c", text], capture_output=True, check=False).returncode != 0
    if fault == "wrong":
        monkeypatch.delenv("PLANTED")
        subprocess.run([sys.executable, "-c", text], capture_output=True, check=True)


@pytest.fixture
def wrong_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.gelu
    monkeypatch.setattr(ops, "gelu", lambda x, approximate: right(x, approximate) * (1.01 if x.numel() > 20 else 1))


@pytest.mark.usefixtures("wrong_gelu")
def test_a_failing_case_is_shrunk_to_what_it_takes() -> None:
    case = GeluCase(name="n", regime="", shape=(9, 64), layout="transposed", scale=30.0)
    trial = Judged(case=case, dtype=torch.float32, seed=7, edge="end")
    with pytest.raises(AssertionError) as failure:
        trial.check()
    small = worker.shrunk(trial, signature(failure.value), 60.0)
    assert isinstance(small, Judged) and isinstance(small.case, GeluCase)
    assert (small.edge, small.case.layout, small.case.scale) == ("", "contiguous", 2.0)
    assert small.case.shape in ((64,), (9, 64))
    with pytest.raises(AssertionError):
        small.check()


@pytest.mark.parametrize("op", FAMILIES)
def test_a_case_is_decided_by_seed_and_number(op: str) -> None:
    drawn = [[FAMILIES[op](Draw(seed, n, op)) for n in range(12)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for trial in drawn[0]:
        text = program(trial, "baseline")
        compile(text, op, "exec")
        assert len(text.splitlines()) <= 10
        namespace: dict[str, object] = {}
        exec("\n".join(line for line in text.splitlines() if line.startswith(("import", "from"))), namespace)
        made = eval(source(trial if not isinstance(trial, Judged) else trial.case), namespace)
        assert made == (trial if not isinstance(trial, Judged) else trial.case)


def test_options_come_in_all_pairs() -> None:
    pool = {n: (lambda n=n: {n: True}) for n in "abcde"}
    pairs = {frozenset(Draw(0, 2 * i).options(pool)) for i in range(10)}
    assert len(pairs) == 10 and {len(p) for p in pairs} == {2}
    assert {len(Draw(0, 2 * i + 1).options(pool)) for i in range(40)} == {3, 4, 5}


# ---- Memory edges


@pytest.mark.parametrize("side", SIDES)
def test_a_tensor_at_an_edge_has_its_values_strides_and_nothing_beside_it(side: str) -> None:
    for t in (torch.randn(7, 5), torch.randn(5, 7).mT[1:, ::2], torch.arange(3).expand(4, 3), torch.randn(())):
        placed = at_edge(t, side)
        assert torch.equal(placed, t) and placed.stride() == t.stride() and placed.dtype == t.dtype
    where = flat(at_edge(torch.randn(1000), side))
    page = os.sysconf("SC_PAGESIZE")
    assert (where.data_ptr() + (where.nbytes if side == "end" else 0)) % page == 0
    # A read one byte further ends the process.
    beyond = "t.data_ptr() + t.nbytes" if side == "end" else "t.data_ptr() - 1"
    text = (
        "import ctypes, torch; from torchweld.testing.fuzz.edges import at_edge\n"
        f"t = at_edge(torch.ones(1000), {side!r}); ctypes.string_at({beyond}, 1)"
    )
    assert fresh.python(text).returncode < 0


@pytest.mark.parametrize("op", ["attention", "layer_norm", "adamw"])
def test_what_kernels_write_at_an_edge_is_kept(op: str) -> None:
    for side in SIDES:
        Judged(case=cases(op)[0], dtype=torch.float32, seed=3, edge=side).check()


# ---- Optimizers


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@pytest.mark.parametrize("event", EVENTS)
def test_every_event_of_a_course_can_be_followed(name: str, event: str) -> None:
    trial = Lockstep(name=name, events=("step", event, "step"), seed=1)
    try:
        trial.check()
    except Skip:
        pytest.fail(f"torch does not follow {event}")


def test_an_optimizer_that_forgets_its_decay_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.adamw_
    monkeypatch.setattr(ops, "adamw_", lambda *a, weight_decay, **k: right(*a, weight_decay=0.0, **k))
    with pytest.raises(AssertionError, match="params: max"):
        Lockstep(name="AdamW", events=("step", "step"), seed=1).check()


# ---- Hostile calls


def test_hostile_calls_reach_functions_ops_and_kernels() -> None:
    for level, name in (
        ("function", "layer_norm"),
        ("op", "torchweld.layer_norm_forward.default"),
        ("kernel", "layer_norm_forward"),
    ):
        trial = Hostile(of="layer_norm", case=0, level=level, changes=())
        assert trial.arguments()[0] == name
        trial.check()
    assert all(small_cases(op) for op in ("attention", "paged_attention", "sgd"))


def careless(input, normalized_shape, weight=None, bias=None, eps=1e-5):  # type: ignore[no-untyped-def]
    if weight.dtype is torch.float64:
        raise RuntimeError("something went wrong")
    if eps == 0:
        raise RuntimeError("[layer_norm] eps: expected a positive number, but got 0")
    return input.double()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (("2", "int"), "'int' object has no attribute 'dtype'"),
        (("2", "float64"), "something went wrong"),
        (("4", "0"), "torch serves it, but got RuntimeError"),
        (("4", "2"), "expected .*torch.float32.* as torch's, but got .*torch.float64"),
        (("1", "int"), None),  # torch refuses that too
    ],
)
def test_a_bare_error_and_an_unlike_result_are_found(
    change: tuple[str, str], error: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = Hostile(of="layer_norm", case=2, level="function", changes=(change,))
    name, _, arguments = trial.arguments()
    monkeypatch.setattr(hostile, "_calls", lambda *_: [(name, careless, tuple(arguments.values()), {})])
    with pytest.raises(Exception, match=error) if error else nullcontext():
        trial.check()


def test_the_kernels_are_the_same_after_a_trial() -> None:
    before = backend.kernels["cpu"]
    Judged(case=cases("gelu")[0], dtype=torch.float32, seed=3, edge="end").check()
    Hostile(of="gelu", case=0, level="kernel", changes=(("0", "None"),)).check()
    assert backend.kernels["cpu"] is before
