"""`torchweld train` in two processes over gloo: the curve of one process, one checkpoint, Ctrl-C and resuming."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from torchweld import cli

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
]

RUN = ("train", "gpt2", "--config", "tiny", "--device", "cpu", "--batch-size", "4")

# Rank 1 alone is interrupted, within its third step.
INTERRUPTED = """
import signal
from torchweld import cli
from torchweld.training.trainer import Trainer

advance = Trainer.advance

def interrupted(self, parts):
    advance(self, parts)
    if self.step == 3 and self.processes.rank == 1:
        signal.raise_signal(signal.SIGINT)

Trainer.advance = interrupted
cli.command()
"""


@pytest.fixture(autouse=True)
def one_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def pair(*command: str) -> list[subprocess.CompletedProcess[str]]:
    """Runs `python COMMAND` as two processes that know of each other, as torchrun would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    return [
        subprocess.CompletedProcess(command, p.returncode, *output) for p, output in zip(started, outputs, strict=True)
    ]


def history(checkpoint: str) -> tuple[list[float], list[tuple[int, float]]]:
    training = json.loads(Path(checkpoint, "training.json").read_text())
    return training["losses"], training["validation"]


def test_two_processes_learn_what_one_does(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = (*RUN, "--data", text, "--steps", "8")
    assert cli.main([*words, "--out", "one"]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*torchrun, "-m", "torchweld", *words, "--accumulate", "2", "--out", "two"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("model: tiny") == result.stdout.count("checkpoint: ") == 1
    assert "2 processes, each on cpu" in result.stdout
    (losses, validation), (expected, validated) = history("two/checkpoint-8"), history("one/checkpoint-8")
    assert losses == pytest.approx(expected, rel=1e-5) and len(losses) == 8
    assert validation[0][1] == pytest.approx(validated[0][1], rel=1e-4)
    assert sorted(p.name for p in Path("two").iterdir()) == ["checkpoint-8", "loss.png", "report.html"]


def test_a_run_that_one_of_them_breaks_off_continues_bit_for_bit(text: str) -> None:
    words = (*RUN, "--data", text, "--steps", "6")
    for result in pair("-m", "torchweld", *words, "--out", "straight"):
        assert result.returncode == 0, result.stderr
    for result in pair("-c", INTERRUPTED, *words, "--out", "broken"):
        assert result.returncode == 130, result.stderr
    assert [p.name for p in Path("broken").iterdir()] == ["checkpoint-3"]
    first, second = pair("-m", "torchweld", "train", "gpt2", "--device", "cpu", "--resume", "broken")
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "resuming after step 3" in first.stdout and second.stdout == ""
    for name in ("model.safetensors", "optimizer.safetensors", "training.json"):
        straight, broken = (Path(out, "checkpoint-6", name).read_bytes() for out in ("straight", "broken"))
        assert straight == broken, name


def test_a_batch_that_cannot_be_shared_is_refused_once(text: str) -> None:
    first, second = pair("-m", "torchweld", *RUN, "--data", text, "--batch-size", "3", "--out", "run")
    assert first.returncode == second.returncode == 2
    assert "--batch-size: expected a multiple of the number of processes, 2, but got 3" in first.stderr
    assert second.stderr == "" and not Path("run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("gpt2", "--parallel", "rows"), "--parallel: expected one of data, fsdp, tensor, context, but got 'rows'"),
        (("gpt2", "--parallel", "fsdp"), "--parallel fsdp: expected several processes, but got one; start them with"),
        (("bert", "--parallel", "context"), "--parallel context: expected a program whose model is a decoder"),
        (("vae", "--parallel", "tensor"), "--parallel tensor: expected a program whose model is a transformer"),
        (("gpt2", "--parallel", "tensor", "--compare"), "--compare: expected processes that share each batch"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", *words, "--device", "cpu", "--out", "run"]) == 2
    assert message in capsys.readouterr().err


def test_heads_that_do_not_divide_are_refused_once(text: str) -> None:
    words = ("train", "gpt2", "--config", "small", "--device", "cpu", "--data", text, "--parallel", "tensor")
    first, second = pair("-m", "torchweld", *words, "--out", "run")
    assert first.returncode == second.returncode == 2
    assert (
        "--parallel tensor: expected a number of processes that divides the model's 3 heads, but got 2" in first.stderr
    )
    assert second.stderr == "" and not Path("run").exists()
