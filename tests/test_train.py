"""`torchweld train` and `torchweld generate`: learning, resuming to the bit, Ctrl-C, --compare, and refusals."""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from torchweld import cli
from torchweld.examples import checkpoint, corpus, report, settings, train_gpt2, trainer
from torchweld.models import CONFIGS, GPT2

FILES = ("config.json", "model.safetensors", "optimizer.safetensors", "tokenizer.json", "training.json")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory and a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def text(home: Path) -> str:
    """The path of 100 kB of Python."""
    return str(shutil.copy(argparse.__file__, home / "text.py"))


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `torchweld ...`: (exit code, stdout, stderr). A refusal is one line."""

    def run(*words: object) -> tuple[int, str, str]:
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as error:  # argparse
            code = int(error.code or 0)
        out, err = capsys.readouterr()
        if code == 2:
            assert err.startswith("torchweld: error: ") and err.count("\n") == 1
        return code, out, err

    return run


@pytest.fixture
def train(text: str, command: Callable) -> Callable[..., tuple[int, str, str]]:
    """Runs `torchweld train gpt2 --config tiny` on the text."""
    return lambda *words: command("train", "gpt2", "--config", "tiny", "--device", "cpu", "--data", text, *words)


def interrupt_after(monkeypatch: pytest.MonkeyPatch, step: int, times: int = 1) -> None:
    """Sends SIGINT to this process from within that step."""
    advance = trainer.Trainer.advance

    def interrupted(self: trainer.Trainer, *batch: torch.Tensor) -> None:
        advance(self, *batch)
        if self.step == step:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(trainer.Trainer, "advance", interrupted)


# ---- Training


def test_learns_saves_and_generates(train: Callable, command: Callable) -> None:
    code, out, _ = train("--steps", 150, "--out", "run")
    assert code == 0
    found = re.search(
        r"validation loss ([\d.]+) nats per token \(perplexity ([\d.]+)\); unigram entropy.* ([\d.]+) \(", out
    )
    loss, perplexity, unigram = map(float, found.groups())
    assert loss < unigram - 0.5
    assert perplexity == pytest.approx(math.exp(loss), rel=0.01)
    assert "class Reader" not in out.split("sample")[0] and "tokens/s" in out and "\x1b" not in out
    assert sorted(p.name for p in Path("run").iterdir()) == ["checkpoint-150", "loss.png"]
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


def test_checkpoint_is_a_hugging_face_model(train: Callable) -> None:
    transformers = pytest.importorskip("transformers", reason="loads the checkpoint with transformers, a test extra")
    train("--steps", 3, "--out", "run")
    theirs = transformers.GPT2LMHeadModel.from_pretrained("run/checkpoint-3").eval()
    config, weights, tokenizer = checkpoint.load_model(Path("run/checkpoint-3"))
    ours = GPT2(config).eval()
    ours.load_hugging_face(weights)
    ids = torch.tensor([tokenizer.encode("import argparse as _argparse\n").ids])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.2])  # dropout draws from torch's random state
def test_resume_continues_bit_for_bit(train: Callable, monkeypatch: pytest.MonkeyPatch, dropout: float) -> None:
    monkeypatch.setitem(CONFIGS, "tiny", replace(CONFIGS["tiny"], dropout=dropout))
    monkeypatch.setattr(train_gpt2, "VALIDATE_EVERY", 5)
    assert train("--steps", 12, "--out", "straight")[0] == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7)
        code, out, _ = train("--steps", 12, "--out", "broken")
    assert code == 130
    assert "interrupted after step 7 of 12" in out and "--resume broken" in out
    assert [p.name for p in Path("broken").iterdir()] == ["checkpoint-7"]
    torch.rand(3)  # resuming must not depend on what the process drew before
    code, out, _ = train("--resume", "broken")
    assert code == 0 and "resuming after step 7" in out
    for name in FILES:
        straight, broken = (Path(out, "checkpoint-12", name).read_bytes() for out in ("straight", "broken"))
        assert straight == broken, name


def test_a_second_interrupt_ends_at_once(train: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(monkeypatch, 3, times=2)
    code, out, _ = train("--steps", 5, "--out", "run")
    assert code == 130 and "nothing is saved" in out
    assert list(Path("run").iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_resume_goes_on_past_the_end(train: Callable) -> None:
    train("--steps", 3, "--out", "run")
    code, out, _ = train("--resume", "run")
    assert code == 0 and "resuming after step 3" in out
    code, out, _ = train("--resume", "run/checkpoint-3", "--steps", 5)
    assert code == 0
    assert sorted(p.name for p in Path("run").iterdir()) == ["checkpoint-5", "loss.png"]


def test_an_earlier_run_is_replaced_only_when_asked(train: Callable) -> None:
    train("--steps", 4, "--out", "run")
    code, _, error = train("--steps", 3, "--out", "run")
    assert code == 2 and "checkpoint-4" in error and "--overwrite" in error
    assert train("--steps", 3, "--out", "run", "--overwrite")[0] == 0
    assert [p.name for p in checkpoint.checkpoints(Path("run"))] == ["checkpoint-3"]


def test_seed_decides_weights_and_order(train: Callable) -> None:
    for seed, out in ((1, "a"), (1, "b"), (2, "c")):
        train("--steps", 2, "--seed", seed, "--out", out)
    a, b, c = (Path(out, "checkpoint-2/model.safetensors").read_bytes() for out in "abc")
    assert a == b != c


def test_bfloat16_keeps_float32_weights(train: Callable) -> None:
    code, _, _ = train("--steps", 30, "--dtype", "bfloat16", "--out", "run")
    assert code == 0
    tensors = load_file("run/checkpoint-30/model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    losses = json.loads(Path("run/checkpoint-30/training.json").read_text())["losses"]
    assert losses[-1] < losses[0] - 0.3


def test_every_backend_trains_alike(train: Callable) -> None:
    for name in ("cpu", "reference"):
        assert train("--steps", 3, "--backend", name, "--out", name)[0] == 0
    a, b = (json.loads(Path(out, "checkpoint-3/training.json").read_text())["losses"] for out in ("cpu", "reference"))
    assert a == pytest.approx(b, rel=1e-5)


def test_divergence_is_reported(train: Callable) -> None:
    code, _, error = train("--steps", 50, "--learning-rate", 1e30, "--out", "run")
    assert code == 2 and "training diverged" in error and "lower --learning-rate" in error


# ---- Beside stock PyTorch


def test_compare_agrees(train: Callable) -> None:
    code, out, _ = train("--steps", 10, "--compare", "--out", "run")
    assert code == 0
    assert float(re.search(r"largest relative difference (\S+) in the first 20", out)[1]) < 1e-4
    assert float(re.search(r"torchweld / torch = ([\d.]+)", out)[1]) > 0
    assert "they agree" in out and re.search(r"\btorch\b.*\d,\d{3}", out)


def test_compare_notices_a_difference(train: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.stock, "layer_norm", lambda x, *rest: x)
    code, out, _ = train("--steps", 3, "--compare", "--out", "run")
    assert code == 1 and "they DIFFER" in out


# ---- Text


def test_standard_library_text(home: Path) -> None:
    documents = corpus.standard_library()
    assert sum(map(len, documents)) > 5_000_000
    assert Path(argparse.__file__).read_text() in documents
    assert topics["try"] in documents
    assert not any("decoding_table = (" in d for d in documents)  # the tables of encodings/


def test_tokenizer_takes_any_text() -> None:
    tokenizer = corpus.train_tokenizer(["def f(x):\n    return x\n" * 50], 300)
    for sample in ("def f(x):", "żółć 漢字 🙂\r\n\t\x07", ""):
        assert tokenizer.decode(tokenizer.encode(sample).ids) == sample
    assert corpus.end_of_text(tokenizer) == 0


def test_corpus_split_windows_and_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [f"document {i} says {i * i}\n" * 20 for i in range(30)]
    text = corpus.load_corpus(list(documents), 300)
    whole = torch.cat([text.train, text.validation])
    assert len(text.validation) == len(whole) // 10
    decoded = text.tokenizer.decode(whole.tolist(), skip_special_tokens=False).split(corpus.END)
    assert sorted(decoded) == sorted(["", *documents])

    inputs, targets = text.batch(4, 16, seed=1, step=5)
    assert inputs.shape == targets.shape == (4, 16) and torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(text.batch(4, 16, 1, 5)[0], inputs)
    assert not torch.equal(text.batch(4, 16, 1, 6)[0], inputs)
    assert not torch.equal(text.batch(4, 16, 2, 5)[0], inputs)

    with monkeypatch.context() as patch:
        patch.setattr(corpus, "train_tokenizer", None)  # the second time nothing is trained
        again = corpus.load_corpus(list(documents), 300)
    assert torch.equal(again.train, text.train) and again.digest == text.digest
    (cached,) = corpus.cache_directory().iterdir()
    cached.write_bytes(cached.read_bytes()[:100])
    assert torch.equal(corpus.load_corpus(list(documents), 300).train, text.train)


def test_every_training_token_can_be_drawn() -> None:
    text = corpus.Corpus(None, "", torch.arange(40), torch.arange(40))
    seen = torch.cat([torch.cat(text.batch(8, 8, 0, step)).flatten() for step in range(100)])
    assert torch.equal(seen.unique(), torch.arange(40))
    validation = torch.cat([torch.cat(b).flatten() for b in text.validation_batches(2, 8, 1000)])
    assert validation.min() == 0 and validation.max() == 39


def test_unigram_entropy() -> None:
    uniform = torch.arange(64).repeat(3)[None]
    assert corpus.unigram_entropy([(uniform, uniform)]) == pytest.approx(math.log(64))
    skewed = torch.tensor([[0, 0, 0, 1]])
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert corpus.unigram_entropy([(skewed, skewed)]) == pytest.approx(expected)


def test_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert corpus.cache_directory() == Path("/somewhere/torchweld")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert corpus.cache_directory() == Path.home() / ".cache/torchweld"


def test_a_cache_that_cannot_be_written_does_no_harm(
    home: Path, train: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "file"))
    assert train("--steps", 2, "--out", "run")[0] == 0


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
    runner = trainer.Trainer(CONFIGS["tiny"], settings.RECIPES["tiny"], "cpu", "float32")
    runner.losses, runner.seconds = [5.0, 4.0], [0.5, 0.5]
    shown = io.StringIO()
    with report.Reporter(Console(file=shown, force_terminal=True, width=120), 0, 10) as reporter:
        reporter.step([runner], 1000)
    assert "2/10" in shown.getvalue() and "loss 4.500, 2,000 tokens/s" in shown.getvalue()
    assert "step 2/10" not in shown.getvalue()


def test_a_missing_matplotlib_is_said(train: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    code, out, _ = train("--steps", 2, "--out", "run")
    assert code == 0 and "pip install torchweld[plot]" in out
    assert not Path("run/loss.png").exists()


# ---- Bad input


@pytest.mark.parametrize(
    "words, message",
    [
        (["--config", "huge"], "--config: expected one of tiny, small, gpt2.* got 'huge'"),
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
    ],
)
def test_train_refuses(home: Path, train: Callable, words: list[str], message: str) -> None:
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


def test_train_refuses_an_unknown_program(command: Callable) -> None:
    code, _, error = command("train", "gpt5")
    assert code == 2 and "gpt2, but got 'gpt5'" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal of a GPU needs a machine without one")
def test_train_refuses_a_gpu_that_is_not_there(train: Callable) -> None:
    code, _, error = train("--device", "cuda")
    assert code == 2 and "torch sees no GPU; use --device cpu" in error


def test_resume_refuses_another_model_or_text(home: Path, train: Callable, command: Callable) -> None:
    train("--steps", 4, "--out", "run")
    for words, message in (
        (["--config", "small"], "--config: expected 'tiny'"),
        (["--data", __file__], "expected the text that the run was started with"),
        (["--steps", 2], "--steps: expected at least the 4 that the run has done, but got 2"),
    ):
        code, _, error = command("train", "gpt2", "--resume", "run", *words)
        assert code == 2 and message in error
    (home / "text.py").unlink()
    code, _, error = command("train", "gpt2", "--resume", "run")
    assert code == 2 and "No such file" in error


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
    train: Callable, command: Callable, damage: Callable, message: str
) -> None:
    train("--steps", 1, "--out", "run")
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
            "optimizer.safetensors: expected the random state and Adam's",
        ),
    ],
)
def test_resume_refuses_a_damaged_checkpoint(train: Callable, damage: Callable, message: str) -> None:
    train("--steps", 1, "--out", "run")
    damage(Path("run/checkpoint-1"))
    code, _, error = train("--resume", "run", "--steps", 2)
    assert code == 2 and re.search(message, error)
    assert [p.name for p in checkpoint.checkpoints(Path("run"))] == ["checkpoint-1"]


@pytest.mark.parametrize(
    "words",
    [["--tokens", "0"], ["--temperature", "-1"], ["--temperature", "inf"], ["--top-k", "0"], ["--top-p", "1.1"]],
)
def test_generate_refuses_nonsense_numbers(command: Callable, words: list[str]) -> None:
    code, out, error = command("generate", "--checkpoint", "run", *words)
    assert code == 2 and out == "" and f"argument {words[0]}: expected a" in error


def test_a_failed_save_leaves_the_last_checkpoint(train: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    train("--steps", 2, "--out", "run")
    before = {p.name: p.read_bytes() for p in Path("run/checkpoint-2").iterdir()}

    def full(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        if path.name == "optimizer.safetensors":
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", full)
    code, _, error = train("--resume", "run", "--steps", 4)
    assert code == 2 and "No space left on device" in error
    assert sorted(p.name for p in Path("run").iterdir()) == ["checkpoint-2", "loss.png"]
    assert {p.name: p.read_bytes() for p in Path("run/checkpoint-2").iterdir()} == before
