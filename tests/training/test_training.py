"""`torchweld train` and `torchweld generate`: learning, resuming to the bit, Ctrl-C, --compare, schedule and report."""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import platform
import re
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from commands import Run, interrupt_after
from torchweld.errors import UserError
from torchweld.models import CONFIGS, GPT2, GPT2Config, stock
from torchweld.training import apart, checkpoint, report, settings, trainer
from torchweld.training.processes import Processes
from torchweld.training.program import Batch
from torchweld.training.programs import PROGRAMS

pytestmark = pytest.mark.slow

TINY = settings.Settings(**asdict(PROGRAMS["gpt2"].recipes["tiny"]), config="tiny", seed=0, data=None)
FILES = ("config.json", "model.safetensors", "optimizer.safetensors", "tokenizer.json", "training.json")


# ---- Training


def test_learns_saves_and_generates(train: Run, command: Run) -> None:
    code, out, _ = train("--steps", 150, "--out", "run")
    assert code == 0
    found = re.search(
        r"validation loss ([\d.]+) nats per token \(perplexity ([\d.]+)\); unigram entropy.* ([\d.]+) \(", out
    )
    assert found is not None, out
    loss, perplexity, unigram = map(float, found.groups())
    assert loss < unigram - 0.5
    assert perplexity == pytest.approx(math.exp(loss), rel=0.01)
    assert "class Reader" not in out.split("sample")[0] and "tokens/s" in out and "\x1b" not in out
    assert sorted(p.name for p in Path("run").iterdir()) == ["checkpoint-150", "loss.png", "report.html"]
    assert sorted(p.name for p in Path("run/checkpoint-150").iterdir()) == sorted(FILES)
    assert Path("run/loss.png").read_bytes().startswith(b"\x89PNG")

    training = json.loads(Path("run/checkpoint-150/training.json").read_text())
    assert len(training["losses"]) == 150 and [step for step, _ in training["validation"]] == [100, 150]
    assert training["validation"][-1][1] == pytest.approx(loss, abs=1e-3)

    say = ("generate", "--checkpoint", "run", "--prompt", "def f(", "--tokens", 40)
    code, first, _ = command(*say, "--seed", 3)
    assert code == 0 and first.startswith("def f(") and len(first) > 40
    assert command(*say, "--seed", 3)[1] == first
    assert command(*say, "--seed", 4)[1] != first
    greedy = command(*say, "--temperature", 0)[1]
    assert command(*say, "--top-k", 1)[1] == greedy == command(*say, "--top-p", 1e-6)[1]


def test_checkpoint_is_a_hugging_face_model(train: Run) -> None:
    transformers = pytest.importorskip("transformers", reason="loads the checkpoint with transformers, a test extra")
    train("--steps", 3, "--out", "run")
    theirs = transformers.GPT2LMHeadModel.from_pretrained("run/checkpoint-3").eval()
    config, weights = checkpoint.load_model(Path("run/checkpoint-3"), GPT2Config.from_hugging_face)
    tokenizer = checkpoint.load_tokenizer(Path("run/checkpoint-3"), config)
    ours = GPT2(config).eval()
    ours.load_hugging_face(weights)
    ids = torch.tensor([tokenizer.encode("import argparse as _argparse\n").ids])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "dropout, options",
    [(0.0, ()), (0.2, ()), (0.0, ("--accumulate", 2, "--optimizer", "sgd"))],
    ids=["plain", "dropout", "in parts, sgd"],
)
def test_resume_continues_bit_for_bit(
    train: Run, monkeypatch: pytest.MonkeyPatch, dropout: float, options: tuple[object, ...]
) -> None:
    monkeypatch.setitem(CONFIGS, "tiny", replace(CONFIGS["tiny"], dropout=dropout))
    steps = ("--steps", 12, "--validate-every", 5, *options)
    assert train(*steps, "--out", "straight")[0] == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7)
        code, out, _ = train(*steps, "--out", "broken")
    assert code == 130
    assert "interrupted after step 7 of 12" in out and "--resume broken" in out
    assert [p.name for p in Path("broken").iterdir()] == ["checkpoint-7"]
    torch.rand(3)  # resuming must not depend on what the process drew before
    code, out, _ = train("--resume", "broken")
    assert code == 0 and "resuming after step 7" in out
    for name in FILES:
        straight, broken = (Path(out, "checkpoint-12", name).read_bytes() for out in ("straight", "broken"))
        assert straight == broken, name


def test_a_batch_in_parts_is_the_same_batch(train: Run) -> None:
    for parts in (1, 4):
        assert train("--steps", 4, "--accumulate", parts, "--out", parts)[0] == 0
    whole, parts = (json.loads(Path(out, "checkpoint-4/training.json").read_text()) for out in "14")
    assert whole["losses"] == pytest.approx(parts["losses"], rel=1e-5)
    assert whole["validation"][0][1] == pytest.approx(parts["validation"][0][1], rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_other_optimizers_learn_as_torchs_do(train: Run, optimizer: str) -> None:
    code, out, _ = train("--steps", 40, "--optimizer", optimizer, "--compare", "torch", "--out", "run")
    assert code == 0 and "they agree" in out and f"of 8 x 64 tokens, {optimizer}" in out
    losses = json.loads(Path("run/checkpoint-40/training.json").read_text())["losses"]
    assert losses[-1] < losses[0] - 0.3


def test_the_best_weights_are_kept_and_used(train: Run, command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation gets worse after the second of three: the weights of that one are kept beside the last ones."""
    losses = iter([3.0, 2.0, 4.0])

    def validate(self: trainer.Trainer, batches: list[Batch]) -> float:
        self.validation.append((self.step, next(losses)))
        return self.validation[-1][1]

    monkeypatch.setattr(trainer.Trainer, "validate", validate)
    code, out, _ = train("--steps", 6, "--validate-every", 2, "--keep-best", "--out", "run")
    assert code == 0 and "best validation: run/best-4, loss 2.0000" in out
    assert "validation loss 2.000 nats per token" in out
    assert sorted(p.name for p in Path("run").iterdir()) == ["best-4", "checkpoint-6", "loss.png", "report.html"]
    best, last = (Path("run", name, "model.safetensors").read_bytes() for name in ("best-4", "checkpoint-6"))
    assert best != last
    say = ("generate", "--tokens", 20, "--seed", 1, "--device", "cpu", "--checkpoint")
    assert command(*say, "run") == command(*say, "run/best-4")
    assert checkpoint.locate(Path("run")).name == "checkpoint-6"


def test_a_second_interrupt_ends_at_once(train: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(monkeypatch, 3, times=2)
    code, out, _ = train("--steps", 5, "--out", "run")
    assert code == 130 and "nothing is saved" in out
    assert list(Path("run").iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_resume_goes_on_past_the_end(train: Run) -> None:
    train("--steps", 3, "--out", "run")
    code, out, _ = train("--resume", "run")
    assert code == 0 and "resuming after step 3" in out
    code, out, _ = train("--resume", "run/checkpoint-3", "--steps", 5)
    assert code == 0
    assert sorted(p.name for p in Path("run").iterdir()) == ["checkpoint-5", "loss.png", "report.html"]


def test_an_earlier_run_is_replaced_only_when_asked(train: Run) -> None:
    train("--steps", 4, "--out", "run")
    code, _, error = train("--steps", 3, "--out", "run")
    assert code == 2 and "checkpoint-4" in error and "--overwrite" in error
    assert train("--steps", 3, "--out", "run", "--overwrite")[0] == 0
    assert [p.name for p in checkpoint.checkpoints(Path("run"))] == ["checkpoint-3"]


def test_seed_decides_weights_and_order(train: Run) -> None:
    for seed, out in ((1, "a"), (1, "b"), (2, "c")):
        train("--steps", 2, "--seed", seed, "--out", out)
    a, b, c = (Path(out, "checkpoint-2/model.safetensors").read_bytes() for out in "abc")
    assert a == b != c


def test_bfloat16_keeps_float32_weights(train: Run) -> None:
    code, _, _ = train("--steps", 30, "--dtype", "bfloat16", "--out", "run")
    assert code == 0
    tensors = load_file("run/checkpoint-30/model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    losses = json.loads(Path("run/checkpoint-30/training.json").read_text())["losses"]
    assert losses[-1] < losses[0] - 0.3


def test_every_backend_trains_alike(train: Run) -> None:
    for name in ("cpu", "reference"):
        assert train("--steps", 3, "--backend", name, "--out", name)[0] == 0
    a, b = (json.loads(Path(out, "checkpoint-3/training.json").read_text())["losses"] for out in ("cpu", "reference"))
    assert a == pytest.approx(b, rel=1e-5)


def test_divergence_is_reported(train: Run) -> None:
    code, _, error = train("--steps", 50, "--learning-rate", 1e30, "--out", "run")
    assert code == 2 and "training diverged" in error and "lower --learning-rate" in error


# ---- Beside stock PyTorch


def test_compare_agrees(train: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    # Inductor would take a minute for what this is about.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    code, out, _ = train("--steps", 10, "--compare", "--out", "run")
    assert code == 0
    for rival in ("torch", "torch.compile"):
        (difference,) = re.findall(rf"and {rival}: they agree; largest relative difference (\S+) in the first 1 ", out)
        assert float(difference) < 1e-4
        (ratio,) = re.findall(rf"torchweld / {rival} = ([\d.]+)", out)
        assert float(ratio) > 0
        assert re.search(rf"\b{rival} .*\d,\d{{3}}", out)


def test_compare_notices_a_difference(train: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock, "layer_norm", lambda x, *rest: x)
    code, out, _ = train("--steps", 3, "--compare", "torch", "--out", "run")
    assert code == 1 and "they DIFFER" in out


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another libc is left as it is")
def test_compare_shows_stock_with_the_default_malloc_beside(text: str) -> None:
    options = ["--config", "tiny", "--device", "cpu", "--steps", "4", "--data", text, "--compare", "torch"]
    done = subprocess.run(
        [sys.executable, "-m", "torchweld", "train", "gpt2", *options], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"memory: glibc \S+ keeps what is freed", done.stdout)
    for rival in ("torch", "torch, default malloc"):
        assert re.search(rf"torchweld / {rival} = [\d.]+", done.stdout)
        assert f"loss curves of torchweld and {rival}: they agree" in done.stdout


def test_a_process_apart_that_ends_is_named() -> None:
    """A rival whose process is gone is an error with a remedy, not a wait for ever."""
    program = PROGRAMS["gpt2"]
    rival = apart.ApartTrainer(program, CONFIGS["tiny"], TINY, "float32", "torch", "torch, default malloc")
    (child,) = multiprocessing.active_children()
    child.kill()
    child.join()
    with pytest.raises(UserError, match=r"'torch, default malloc' has ended .*--no-keep-memory"):
        rival.advance([Batch((torch.zeros(1, 2), torch.zeros(1, 2)), {"loss": 2}, 2)])


# ---- Schedule and report


def test_schedule() -> None:
    recipe = settings.Recipe(steps=100, batch_size=1, learning_rate=1.0)
    rates = [recipe.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10] == 1.0 and rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.05 + 0.95 / 2)
    assert 0.05 < rates[-1] < 0.051
    assert settings.Recipe(steps=1, batch_size=1, learning_rate=1.0).rate(0) == 1.0


def test_a_terminal_gets_a_live_bar() -> None:
    runner = trainer.Trainer(PROGRAMS["gpt2"], CONFIGS["tiny"], TINY, Processes(), "float32")
    runner.losses, runner.seconds, runner.counts = [5.0, 4.0], [0.5, 0.5], [1000, 1000]
    shown = io.StringIO()
    with report.Reporter(Console(file=shown, force_terminal=True, width=120), 0, 10, PROGRAMS["gpt2"]) as reporter:
        reporter.step([runner])
    assert "2/10" in shown.getvalue() and "loss 4.500, 2,000 tokens/s" in shown.getvalue()
    assert "step 2/10" not in shown.getvalue()


def test_a_missing_matplotlib_is_said(train: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    code, out, _ = train("--steps", 2, "--out", "run")
    assert code == 0 and "pip install torchweld[plot]" in out
    assert not Path("run/loss.png").exists()
