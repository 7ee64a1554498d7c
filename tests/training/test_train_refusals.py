"""What `torchweld train` and `torchweld generate` refuse, each in one line, and leave as it was."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import Run
from torchweld import cli
from torchweld.training import checkpoint
from torchweld.training.programs import PROGRAMS


@pytest.mark.parametrize(
    "words, message",
    [
        (["--config", "huge"], "--config: expected one of tiny, small, medium, gpt2.* got 'huge'"),
        (["--device", "tpu"], "--device: expected cpu, cuda or cuda:N, but got 'tpu'"),
        (["--device", "meta"], "--device: expected cpu, cuda"),
        (["--dtype", "float16"], "--dtype: expected one of float32, bfloat16, but got 'float16'"),
        (["--backend", "fast"], "--backend: expected one of cuda, cpu, reference.* got 'fast'"),
        (["--backend", "cuda"], "--backend: expected cpu or reference with --device cpu, but got 'cuda'"),
        (["--steps", "0"], "--steps: expected a whole number of at least 1, but got '0'"),
        (["--steps", "ten"], "--steps: expected a whole number of at least 1, but got 'ten'"),
        (["--steps", "9" * 30], "--steps: expected a whole number"),
        (["--batch-size", "-4"], "--batch-size: expected a whole number"),
        (["--learning-rate", "nan"], "--learning-rate: expected a number above 0, but got 'nan'"),
        (["--learning-rate", "0"], "--learning-rate: expected a number above 0"),
        (["--seed", "-1"], "--seed: expected a whole number of at least 0"),
        (["--data", "absent.txt"], "--data .*absent.txt: .*No such file"),
        (["--data", "folder"], "--data .*folder: .*Is a directory"),
        (["--data", "empty.txt"], "--data .*empty.txt: expected text, but the file is empty"),
        (["--data", "image.png"], "--data .*image.png: expected UTF-8 text, but got byte 0x89 at offset 0"),
        (["--data", "zeros.bin"], "--data .*zeros.bin: expected text, but got a binary file"),
        (["--data", "short.txt"], "text: expected at least 66 tokens for training.* got 18 .*; give more text"),
        (["--out", "empty.txt/run"], "--out empty.txt/run: expected a directory that can be written.*Not a directory"),
        (["--resume", "nowhere"], "checkpoint nowhere: .*no such directory"),
        (["--resume", "folder"], "checkpoint folder: .*empty or foreign"),
        (["--resume", "run", "--compare"], "--compare: expected a fresh run"),
        (["--resume", "run", "--overwrite"], "--overwrite: expected a fresh run"),
        (["--resume", "run", "--out", "other"], "--out: expected none beside --resume run.* got 'other'"),
        (["--optimizer", "lion"], "--optimizer: expected one of adamw, adam, sgd, but got 'lion'"),
        (["--accumulate", "3"], "--batch-size: expected a multiple of the parts of --accumulate, 3, but got 8"),
        (["--compare", "jax"], "--compare: expected names out of torch, torch.compile, but got 'jax'"),
    ],
)
def test_train_refuses(home: Path, train: Run, words: list[str], message: str) -> None:
    (home / "folder").mkdir()
    (home / "empty.txt").write_text(" \n")
    (home / "image.png").write_bytes(b"\x89PNG\r\n")
    (home / "zeros.bin").write_bytes(bytes(1000))
    (home / "short.txt").write_text("too short to learn from\n" * 3)
    before = sorted(home.glob("**/[!.]*.*"))
    code, _, error = train("--device", "cpu", *words)
    assert code == 2
    assert re.search(message, error)
    written = [p for p in sorted(home.glob("**/[!.]*.*")) if p not in before and "cache" not in p.parts]
    assert written == [] and not (home / "torchweld-gpt2").exists()


def test_train_refuses_an_unknown_program(command: Run) -> None:
    code, _, error = command("train", "gpt5")
    assert code == 2 and f"one of {', '.join(PROGRAMS)}, but got 'gpt5'" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal of a GPU needs a machine without one")
def test_train_refuses_a_gpu_that_is_not_there(train: Run) -> None:
    code, _, error = train("--device", "cuda")
    assert code == 2 and "torch sees no GPU; use --device cpu" in error


def test_resume_refuses_another_model_or_text(home: Path, train: Run, command: Run) -> None:
    train("--steps", 4, "--out", "run")
    for words, message in (
        (["--config", "small"], "--config: expected 'tiny'"),
        (["--data", __file__], "expected the text that the run was started with"),
        (["--optimizer", "sgd"], "--optimizer: expected 'adamw', with which the run was started, but got 'sgd'"),
        (["--steps", 2], "--steps: expected at least the 4 that the run has done, but got 2"),
    ):
        code, _, error = command("train", "gpt2", "--resume", "run", *words)
        assert code == 2 and message in error
    code, _, error = command("train", "gpt3", "--resume", "run")
    assert code == 2 and "expected a run of gpt3, but got one of gpt2" in error
    (home / "text.py").unlink()
    code, _, error = command("train", "gpt2", "--resume", "run")
    assert code == 2 and "No such file" in error


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, on the text of the fixture `text`."""
    folder = tmp_path_factory.mktemp("trained")
    words = ["train", "gpt2", "--config", "tiny", "--device", "cpu", "--data", argparse.__file__, "--steps", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        assert cli.main([*words, "--out", str(folder / "run")]) == 0
    return folder / "run"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def drop_moments(path: Path) -> None:
    tensors = load_file(path)
    del tensors["ln_f.weight/exp_avg"]
    save_file(tensors, path)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda d: truncate(d / "model.safetensors"), "model.safetensors: expected one that `torchweld train` wrote"),
        (lambda d: (d / "model.safetensors").unlink(), "model.safetensors: .*No such file"),
        (lambda d: (d / "config.json").write_text("{"), "config.json: .*no JSON"),
        (lambda d: (d / "config.json").write_text("[]"), "config.json: .*a list, not an object"),
        (lambda d: edit(d / "config.json", model_type="bert"), "config.json: model_type: expected 'gpt2'"),
        (lambda d: edit(d / "config.json", n_embd=128), "expected shape"),
        (lambda d: edit(d / "config.json", vocab_size=100), "512 tokens for a vocab_size of 100"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer.json"),
        (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json: .*No such file"),
        (shutil.rmtree, "no such directory"),
    ],
)
def test_generate_refuses_a_damaged_checkpoint(
    trained: Path, command: Run, damage: Callable[[Path], Any], message: str
) -> None:
    shutil.copytree(trained, "run")
    damage(Path("run/checkpoint-1"))
    code, out, error = command("generate", "--checkpoint", "run/checkpoint-1", "--device", "cpu")
    assert code == 2 and out == "" and re.search(message, error)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda d: (d / "training.json").unlink(), "training.json: .*No such file"),
        (lambda d: (d / "training.json").write_text("{}"), "training.json: .*no 'digest' in it"),
        (lambda d: edit(d / "training.json", step=9), "training.json: .*contradict"),
        (lambda d: edit(d / "training.json", losses=1.5), "training.json: .*contradict"),
        (lambda d: edit(d / "training.json", settings={"a": 1}), "training.json: expected the settings"),
        (lambda d: truncate(d / "optimizer.safetensors"), "optimizer.safetensors"),
        (
            lambda d: drop_moments(d / "optimizer.safetensors"),
            "optimizer.safetensors: expected Adam's moments",
        ),
    ],
)
def test_resume_refuses_a_damaged_checkpoint(
    trained: Path, train: Run, damage: Callable[[Path], Any], message: str
) -> None:
    shutil.copytree(trained, "run")
    damage(Path("run/checkpoint-1"))
    code, _, error = train("--resume", "run", "--steps", 2)
    assert code == 2 and re.search(message, error)
    assert [p.name for p in checkpoint.checkpoints(Path("run"))] == ["checkpoint-1"]


def test_generate_refuses_a_prompt_that_is_no_text(command: Run) -> None:
    code, out, error = command("generate", "--checkpoint", "run", "--prompt", "def \udcff")  # a byte that is not UTF-8
    assert code == 2 and out == "" and "--prompt: expected text" in error


@pytest.mark.parametrize(
    "words",
    [["--tokens", "0"], ["--temperature", "-1"], ["--temperature", "inf"], ["--top-k", "0"], ["--top-p", "1.1"]],
)
def test_generate_refuses_nonsense_numbers(command: Run, words: list[str]) -> None:
    code, out, error = command("generate", "--checkpoint", "run", *words)
    assert code == 2 and out == "" and f"argument {words[0]}: expected a" in error


def test_a_failed_save_leaves_the_last_checkpoint(train: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    train("--steps", 2, "--out", "run")
    before = {p.name: p.read_bytes() for p in Path("run/checkpoint-2").iterdir()}

    def full(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        if path.name == "optimizer.safetensors":
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", full)
    code, _, error = train("--resume", "run", "--steps", 4)
    assert code == 2 and "No space left on device" in error
    assert sorted(p.name for p in Path("run").iterdir()) == ["checkpoint-2", "loss.png", "report.html"]
    assert {p.name: p.read_bytes() for p in Path("run/checkpoint-2").iterdir()} == before
