"""AST: that of transformers to the digit, both ways; and its program, on words made of tones."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from commands import Run, check_resuming, perturbed
from leaves import gradient
from tones import write_words
from torchweld.errors import UserError
from torchweld.models import AST, ASTConfig, ast
from torchweld.training import checkpoint

TINY = replace(ast.CONFIGS["tiny"], max_length=23, num_mel_bins=13, patch_size=5, time_stride=3, frequency_stride=4)
TINY = replace(TINY, labels=("a", "b", "c"))
FILES = ("config.json", "model.safetensors", "optimizer.safetensors", "speech.json", "training.json")


@pytest.fixture
def published() -> Any:
    transformers = pytest.importorskip("transformers", reason="the oracle of AST is transformers' AST, a test extra")
    return perturbed(transformers.ASTForAudioClassification(transformers.ASTConfig(**TINY.to_hugging_face())))


def test_logits_and_gradients_are_those_of_transformers(published: Any, ops: ModuleType, home: Path) -> None:
    published.save_pretrained(home / "theirs")
    model = AST(TINY, ops).eval()
    config, weights = checkpoint.load_model(home / "theirs", ASTConfig.from_hugging_face)
    assert config == TINY
    model.load_hugging_face(weights)
    x, labels = torch.randn(5, 23, 13), torch.tensor([0, 2, 1, 2, 0])
    expected = published(x, labels=labels)
    assert expected.logits.std() > 0.3  # else 1e-4 would say little
    torch.testing.assert_close(model(x), expected.logits, rtol=0, atol=1e-4)
    expected.loss.backward()
    model.loss(x, labels).backward()
    theirs = {name: p.grad for name, p in published.named_parameters()}
    own = {"classifier.dense.weight": model.classifier.weight, "classifier.layernorm.bias": model.head_norm.bias}
    embeddings = "audio_spectrogram_transformer.embeddings."
    own[f"{embeddings}cls_token"], own[f"{embeddings}distillation_token"] = model.first, model.second
    own[f"{embeddings}patch_embeddings.projection.weight"] = model.embed.weight
    own[f"{embeddings}position_embeddings"] = model.positions
    for name, leaf in own.items():
        grad = theirs[name]
        torch.testing.assert_close(gradient(leaf), grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item())


def test_export_loads_into_transformers(published: Any, home: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="loads what we save, a test extra")
    model = perturbed(AST(TINY))
    folder = home / "ours"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY.to_hugging_face()))
    torch.save(model.to_hugging_face(), folder / "pytorch_model.bin")
    theirs = transformers.ASTForAudioClassification.from_pretrained(folder).eval()
    x = torch.randn(4, 23, 13)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits, model(x), rtol=0, atol=1e-4)
    again = AST(TINY)
    again.load_hugging_face(model.to_hugging_face())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_published_size() -> None:
    transformers = pytest.importorskip("transformers", reason="has the shapes of the published AST, a test extra")
    with torch.device("meta"):
        model = AST(ASTConfig(labels=tuple(map(str, range(527)))))
        theirs = transformers.ASTForAudioClassification(transformers.ASTConfig(num_labels=527))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters()) > 86e6


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model_type": "vit"}, "model_type: expected 'audio-spectrogram-transformer'"),
        ({"qkv_bias": False}, "qkv_bias: expected True"),
        ({"patch_size": 14}, "expected patch_size up to 13, but got 14"),
        ({"num_attention_heads": 3}, "expected hidden_size divisible by num_attention_heads, but got 32 and 3"),
    ],
)
def test_foreign_configs_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ASTConfig.from_hugging_face({**TINY.to_hugging_face(), **values})


def test_spectrograms_of_another_size_are_refused() -> None:
    with pytest.raises(UserError, match=r"expected spectrograms of \[23, 13\], but got \[13, 23\]"):
        AST(TINY)(torch.zeros(2, 13, 23))


# ---- The program


@pytest.fixture
def train(home: Path, command: Run) -> Run:
    """Runs `torchweld train speech --config tiny` on rising and falling tones."""
    options = ("--config", "tiny", "--device", "cpu", "--no-keep-memory", "--data", write_words(home / "words"))
    return lambda *words: command("train", "speech", *options, *words)


@pytest.mark.slow
def test_it_computes_as_stock_does(train: Run) -> None:
    code, out, error = train("--steps", 20, "--validate-every", 10, "--compare", "torch", "--out", "run")
    assert code == 0 and "they agree" in out, error


@pytest.mark.slow
def test_it_learns_and_classifies(train: Run, command: Run, home: Path) -> None:
    code, out, error = train("--steps", 150, "--validate-every", 75, "--out", "run")
    assert code == 0, error
    assert "recordings/s" in out and "by 16 / 2 / 2 speakers or voices, 3 words" in out
    found = json.loads(Path("run/scores.json").read_text())
    assert found["AST"]["accuracy"] >= 0.9 and found["most frequent word"]["accuracy"] == pytest.approx(1 / 3)
    assert found["nearest of 96 recordings, by time warping"]["accuracy"] > 0.5
    assert (
        "accuracy of the test" in out and "heard wrong" in out and "heard wrong" in Path("run/report.html").read_text()
    )
    paths = sorted((home / "words").glob("*/*.wav"))
    code, out, error = command("classify", "--checkpoint", "run", *paths, "--device", "cpu", "--json")
    assert code == 0, error
    said = [json.loads(line) for line in out.splitlines()]
    assert [line["file"] for line in said] == list(map(str, paths))
    assert sum(line["label"] == Path(line["file"]).parent.name for line in said) >= 0.85 * len(said)
    code, out, _ = command("classify", "--checkpoint", "run", paths[0], "--device", "cpu")
    assert code == 0 and out == f"{said[0]['label']}\t{said[0]['probability']}\t{paths[0]}\n"


@pytest.mark.slow
def test_resume_continues_bit_for_bit(train: Run, command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    check_resuming(train, partial(command, "train", "speech"), monkeypatch, FILES)


def test_refusals(train: Run, home: Path, monkeypatch: pytest.MonkeyPatch, command: Run) -> None:
    damaged = write_words(home / "damaged", 3)
    (damaged / "rise" / "s1_1.wav").write_bytes(b"RIFF")
    for words, message in (
        (("--data", damaged), "s1_1.wav: expected a WAV file of PCM, 8 to 32 bits"),
        (("--flip",), "--flip: expected a program that has this option, but got speech"),
        (("--data", home / "nowhere"), "expected a folder of recordings"),
    ):
        code, _, error = train(*words)
        assert code == 2 and message in error and not Path("torchweld-speech").exists()
    code, _, error = command("train", "speech", "--device", "cpu")
    assert code == 2 and "get it with `torchweld data get asterisk-en`" in error
    (home / "cache" / "torchweld" / "data" / "asterisk-en" / "en" / "digits").mkdir(parents=True)
    monkeypatch.setenv("PATH", "")
    code, _, error = command("train", "speech", "--device", "cpu")
    assert code == 2 and "or the command espeak-ng" in error and "apt-get install espeak-ng" in error


def test_classify_refuses(command: Run, home: Path) -> None:
    folder = home / "ast"
    folder.mkdir()
    model = AST(replace(ast.CONFIGS["tiny"], labels=("a", "b")))
    (folder / "config.json").write_text(json.dumps(model.config.to_hugging_face()))
    save_file({name: t.contiguous() for name, t in model.to_hugging_face().items()}, folder / "model.safetensors")
    words = ("classify", "--checkpoint", folder, "--device", "cpu")
    code, out, error = command(*words)
    assert code == 2 and out == "" and "expected the names of WAV files, but got none" in error
    code, out, error = command(*words, "a.wav")
    assert code == 2 and out == "" and "speech.json" in error  # of another kind of spectrogram
    (folder / "speech.json").write_text('{"sampling_rate": 16000}')
    code, out, error = command(*words, "a.wav")
    assert code == 2 and out == "" and "train it with `torchweld train speech`" in error
