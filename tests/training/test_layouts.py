"""`torchweld train` with its model spread over two processes, and checkpoints that each process writes a part of."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load, save

from commands import Run
from gloo_processes import in_processes, needs_gloo
from pictures import write_idx
from tones import write_words
from torchweld import cli
from torchweld.training import checkpoint, pretraining, processes, run
from torchweld.training.processes import Processes

pytestmark = [needs_gloo, pytest.mark.slow]
COMMON = ("--device", "cpu", "--no-keep-memory", "--validate-every", "100")
PARTS = ("--checkpoint-format", "distributed")


def data() -> dict[str, tuple[str, ...]]:
    """Of each program, its words on the command line; files in the working directory."""
    Path("text.txt").write_text("\n\n".join(" ".join(f"w{i}x{j % (40 + i)}" for j in range(90)) for i in range(30)))
    words = ["open", "close", "the", "window", "lamp", "door", "red", "old"]
    lines = [" ".join(words[(i * k) % 8] for k in range(1, 2 + i % 5)) for i in range(400)]
    Path("pairs.tsv").write_text("".join(f"{line} {i % 7}\t{line.upper()} {i % 7}\n" for i, line in enumerate(lines)))
    return {
        "bert": ("text.txt", "--batch-size", "16", "--keep-best", "--validate-every", "2"),
        "seq2seq": ("pairs.tsv", "--batch-size", "200"),
        "vit": (str(write_idx(Path("idx"), 60, 20)), "--batch-size", "8"),
        "vae": ("idx", "--batch-size", "8"),
        "speech": (str(write_words(Path("words"), 3)), "--batch-size", "6"),
    }


class Together:
    """This process's command line: of one that torchrun has started with another, or of one that is alone."""

    def __init__(self, rank: int) -> None:
        self.rank, self.said = rank, ""

    def command(self, *words: str, parallel: bool = True) -> int:
        @contextlib.contextmanager
        def joined(device: str, kind: str = "data") -> Iterator[Processes]:
            yield Processes(self.rank, 2, device, kind)

        setattr(run, "joined", joined if parallel else processes.joined)  # noqa: B010  (mypy knows no such name there)
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = cli.main(list(words))
        self.said = said.getvalue()
        return code

    def train(self, name: str, *words: str, parallel: bool = True) -> None:
        code = self.command("train", name, *COMMON, *words, parallel=parallel)
        assert code == 0, self.said


def history(out: str) -> tuple[list[float], list[float]]:
    training = json.loads((checkpoint.checkpoints(Path(out))[-1] / "training.json").read_text())
    return training["losses"], [loss for _, loss in training["validation"]]


def same_curve(found: str, right: str, steps: int) -> None:
    (losses, validation), (expected, validated) = history(found), history(right)
    assert losses == pytest.approx(expected, rel=1e-5), (found, losses, expected)
    assert len(losses) == steps, (found, losses)
    assert validation[-1] == pytest.approx(validated[-1], rel=1e-4)


def contents(directory: str) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in Path(directory).rglob("*") if p.is_file()}


def silently(job: Any, found: Any) -> None:
    """The end of a run: what it shows takes its time."""
    job.save()


def layouts(rank: int, folder: str) -> None:
    os.chdir(folder)
    os.environ["XDG_CACHE_HOME"] = folder
    together, finish, pretraining.VALIDATION_PAIRS = Together(rank), run.finish, 32
    run.finish = silently
    given: list[Any] = [data() if rank == 0 else None]
    dist.broadcast_object_list(given)
    fresh = {name: ("--config", "tiny", "--data", *words) for name, words in given[0].items()}
    remove, checkpoint.remove_others = checkpoint.remove_others, lambda newest: None
    for name, words in fresh.items():
        if rank == 0:
            together.train(name, *words, "--steps", "3", "--out", f"{name}-1", parallel=False)
        dist.barrier()
        kind = "fsdp" if name == "vae" else "tensor"
        together.train(name, *words, "--parallel", kind, *PARTS, "--steps", "3", "--out", f"{name}-2")
        same_curve(f"{name}-2", f"{name}-1", 3)
        if kind == "tensor" and name != "bert":
            dist.barrier()
            if rank == 0:
                together.train(name, "--resume", f"{name}-1", "--steps", "4", parallel=False)
            together.train(name, "--resume", f"{name}-2", "--parallel", "fsdp", "--steps", "4")
            if rank == 0:
                same_curve(f"{name}-2", f"{name}-1", 4)

    # A run goes on in any layout, from parts or whole files.
    checkpoint.remove_others = remove
    if rank == 0:
        for copy, step in (("bit", 3), ("full", 2)):  # as a run that ended after step 2, and one that did not
            shutil.copytree("bert-2", copy, ignore=shutil.ignore_patterns(f"checkpoint-{step}"))
        for out in ("bert-1", "bert-2"):
            shutil.rmtree(f"{out}/checkpoint-2")
    dist.barrier()
    together.train("bert", "--resume", "bert-2", "--parallel", "fsdp", "--steps", "4")
    if rank == 0:
        shutil.copytree("bert-2", "gathered")
        assert together.command("fill-mask", "--checkpoint", "gathered", "[MASK]", parallel=False) == 2
        assert "its weights are in parts" in together.said and "torchweld gather gathered" in together.said
        assert together.command("gather", "gathered", parallel=False) == 0
        for kept in Path("gathered").iterdir():  # checkpoint-4, best-STEP
            assert not {"model", "optimizer", "parts.json"} & {p.name for p in kept.iterdir()}
        assert together.command("fill-mask", "--checkpoint", "gathered", "[MASK]", parallel=False) == 0
        assert together.command("gather", "gathered", parallel=False) == 2
        assert "has model.safetensors already" in together.said
        run.finish = finish
        together.train("bert", "--resume", "bert-2", "--steps", "6", parallel=False)  # it shows, and writes parts
        for steps in ("4", "6"):
            together.train("bert", "--resume", "bert-1", "--steps", steps, parallel=False)
        same_curve("bert-2", "bert-1", 6)
        assert "masked, right" in together.said and Path("bert-2/checkpoint-6/model").is_dir()
        run.finish = silently
    dist.barrier()
    together.train("bert", "--resume", "gathered", "--parallel", "tensor", "--steps", "6")
    same_curve("gathered", "bert-1", 6)
    assert Path("gathered/checkpoint-6/model.safetensors").is_file()

    # In the same layout to the bit.
    resumed = together.command("train", "bert", "--device", "cpu", "--resume", "bit", "--parallel", "tensor")
    assert resumed == 0, together.said
    found, right = contents("bit/checkpoint-3"), contents("full/checkpoint-3")
    assert found.keys() == right.keys() and len([name for name in found if name.startswith("model/")]) == 2
    for name, text in found.items():
        if not name.endswith(".safetensors"):
            assert text == right[name], name
        else:  # whose head has its entries in no order
            ours, theirs = load(text), load(right[name])
            assert ours.keys() == theirs.keys() and all(torch.equal(t, theirs[each]) for each, t in ours.items())

    # A decoder also shares the tokens of each sequence.
    legs = (("2", "fsdp"), ("4", "tensor"), ("6", "context"), ("8", None))
    for steps, layout in legs:
        begin = ("--config", "tiny", "--batch-size", "4", "--data", "text.txt") if steps == "2" else ("--resume",)
        if rank == 0:
            together.train("gpt2", "--steps", steps, "--out", "gpt2-1", *begin, parallel=False)
        if rank == 0 or layout:
            there = ("--parallel", layout) if layout else ()
            together.train("gpt2", "--steps", steps, "--out", "gpt2-2", *begin, *there, parallel=layout is not None)
        assert layout is None or rank or f"2 processes ({layout} parallel), each on cpu" in together.said
    assert rank or Path("gpt2-2/checkpoint-8/model.safetensors").is_file()
    if rank == 0:
        same_curve("gpt2-2", "gpt2-1", 8)

    # A disk that is full in one process.
    from torch.distributed.checkpoint import hf_storage  # noqa: PLC0415

    write = hf_storage.HuggingFaceStorageWriter.write_data

    def full(self: Any, plan: Any, planner: Any) -> Any:
        if rank == 1 and "optimizer" in str(self.path):
            raise OSError(28, "No space left on device")
        return write(self, plan, planner)

    before = contents("full/checkpoint-3")
    hf_storage.HuggingFaceStorageWriter.write_data = full  # type: ignore[method-assign]
    code = together.command("train", "bert", *COMMON, "--resume", "full", "--parallel", "tensor", "--steps", "4")
    hf_storage.HuggingFaceStorageWriter.write_data = write  # type: ignore[method-assign]
    assert code == 2 and ("--out full: expected a directory that can be written" in together.said) == (rank == 0)
    assert rank or "No space left on device" in together.said
    dist.barrier()
    assert contents("full/checkpoint-3") == before
    assert [p.name for p in Path("full").glob("*check*")] == ["checkpoint-3"]


def test_layouts() -> None:
    in_processes(layouts, 2)


# ---- One process


@pytest.fixture
def parts(train: Run) -> Path:
    """A run of one step whose checkpoint is in parts."""
    code, _, error = train("--steps", 1, *PARTS, "--keep-best", "--out", "run")
    assert code == 0, error
    return Path("run/checkpoint-1")


KILLED = """
import os, signal
from torch.distributed.checkpoint import hf_storage
from torchweld import cli

write = hf_storage.HuggingFaceStorageWriter.write_data

def killed(self, plan, planner):
    if "optimizer" in str(self.path):
        os.kill(os.getpid(), signal.SIGKILL)
    return write(self, plan, planner)

hf_storage.HuggingFaceStorageWriter.write_data = killed
cli.command()
"""


def test_a_kill_while_writing_leaves_the_last_checkpoint(parts: Path, command: Run) -> None:
    before = contents("run/checkpoint-1")
    words = ("train", "gpt2", "--device", "cpu", "--resume", "run", "--steps", "2")
    done = subprocess.run([sys.executable, "-c", KILLED, *words], check=False, capture_output=True)
    assert done.returncode == -9
    assert len(list(Path("run").glob(".checkpoint-2-*"))) == 1  # it was on its way
    assert contents("run/checkpoint-1") == before
    Path(f"run/.checkpoint-2-{os.getpid()}").mkdir()  # left by one that had this process's number
    code, out, error = command(*words)
    assert code == 0 and "resuming after step 1" in out, error
    assert checkpoint.checkpoints(Path("run")) == [Path("run/checkpoint-2")]


def _rewrite(path: Path, name: str, rows: slice, offset: int) -> None:
    """Leaves but some rows of a tensor, which say that they lie at `offset` of the whole."""
    tensors = load(path.read_bytes())
    tensors[name] = tensors[name][rows].clone()
    offsets = {each: {"saved_offsets": [0] * t.dim()} for each, t in tensors.items()}
    offsets[name]["saved_offsets"][0] = offset
    path.write_bytes(save(tensors, {"DCP_SHARDING_INFO": json.dumps(offsets)}))


def _twice(path: Path, name: str) -> None:
    """Leaves the second half of a tensor alone, in two files."""
    _rewrite(path, name, slice(256, 512), 256)
    tensors = {name: load(path.read_bytes())[name]}
    head = {"DCP_SHARDING_INFO": json.dumps({name: {"saved_offsets": [256, 0]}})}
    path.with_name("shard-00002-model-00001-of-00001.safetensors").write_bytes(save(tensors, head))


SHARD = "shard-00001-model-00001-of-00001.safetensors"
DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda at: shutil.rmtree(at / "model"), "run/checkpoint-1/model: .*No such file or directory"),
    (lambda at: (at / "optimizer" / SHARD).unlink(), "optimizer: .* no 'h.0.attn.c_attn.bias/exp_avg' in it"),
    (lambda at: os.truncate(at / "model" / SHARD, 5000), "run/checkpoint-1/model: expected one that .* got: .*"),
    (lambda at: (at / "model" / SHARD).write_bytes(b""), "run/checkpoint-1/model: expected one that .* got: .*"),
    (
        lambda at: _rewrite(at / "model" / SHARD, "wte.weight", slice(256), 0),
        r"'wte.weight' .* \[256, 64\] in place of",
    ),
    (
        lambda at: _rewrite(at / "model" / SHARD, "wte.weight", slice(256), 256),
        "16384 of the 32768 numbers of 'wte.weight': a file is missing",
    ),
    (lambda at: _twice(at / "model" / SHARD, "wte.weight"), "16384 of the 32768 numbers of 'wte.weight'"),
    (lambda at: (at / "training.json").write_text("[1"), "training.json: .* no JSON"),
    (
        lambda at: shutil.copytree(at / "optimizer", at / "model", dirs_exist_ok=True),
        "model: .*, which is unknown|no '",
    ),
]


def test_damaged_parts_are_refused(parts: Path, command: Run) -> None:
    shutil.copytree("run", "kept")
    for damage, message in DAMAGES:
        damage(parts)
        for words in (("train", "gpt2", "--device", "cpu", "--resume", "run", "--steps", 2), ("gather", "run")):
            code, _, error = command(*words)
            assert code == 2 and re.search(message, error), (message, error)
        assert [p.name for p in checkpoint.checkpoints(Path("run"))] == ["checkpoint-1"]
        shutil.rmtree("run")
        shutil.copytree("kept", "run")
    (parts / checkpoint.PARTS).write_text('{"program": "gpt9"}')
    code, _, error = command("gather", "run")
    assert code == 2 and "parts.json: expected one that" in error and "the program 'gpt9'" in error
    code, _, error = command("train", "gpt2", "--device", "cpu", "--resume", "run", "--checkpoint-format", "zip")
    assert code == 2 and "--checkpoint-format: expected one of safetensors, distributed, but got 'zip'" in error


def test_a_full_disk_leaves_the_parts(parts: Path, command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"beginning")
        raise OSError(28, "No space left on device")

    before = contents("run")
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", full)
        code, _, error = command("gather", "run")
    assert code == 2 and "No space left on device" in error and contents("run") == before
    resume = ("train", "gpt2", "--device", "cpu", "--resume", "run", "--steps")
    code, out, error = command(*resume, 1, "--checkpoint-format", "safetensors")  # shows the best, which is in parts
    assert code == 0 and "best validation: run/best-1" in out, error
    Path(f"run/.checkpoint-2-{os.getpid()}").mkdir()
    code, _, error = command(*resume, 2, "--checkpoint-format", "safetensors")
    assert code == 0, error
    assert Path("run/checkpoint-2/model.safetensors").is_file() and not Path("run/checkpoint-2/model").exists()
    assert command(*resume, 3)[0] == 0 and Path("run/checkpoint-3/model.safetensors").is_file()
