"""ViT: that of transformers to the digit, both ways; and its program."""

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
from pictures import NAMES, drawn, write_folders, write_idx
from torchweld.errors import UserError
from torchweld.models import ViT, ViTConfig, vit
from torchweld.training import checkpoint, images, logistic

TINY = replace(vit.CONFIGS["tiny"], image_size=12, num_channels=3, labels=("a", "b", "c"))
FILES = ("config.json", "model.safetensors", "optimizer.safetensors", "preprocessor_config.json", "training.json")


@pytest.fixture
def published() -> Any:
    transformers = pytest.importorskip("transformers", reason="the oracle of ViT is transformers' ViT, a test extra")
    return perturbed(transformers.ViTForImageClassification(transformers.ViTConfig(**TINY.to_hugging_face())))


def test_logits_and_gradients_are_those_of_transformers(published: Any, ops: ModuleType, home: Path) -> None:
    published.save_pretrained(home / "theirs")
    model = ViT(TINY, ops).eval()
    config, weights = _read(home / "theirs")
    assert config == TINY
    model.load_hugging_face(weights)
    x, labels = torch.randn(5, 3, 12, 12), torch.tensor([0, 2, 1, 2, 0])
    expected = published(x, labels=labels)
    assert expected.logits.std() > 0.3  # else 1e-4 would say little
    torch.testing.assert_close(model(x), expected.logits, rtol=0, atol=1e-4)
    expected.loss.backward()
    model.loss(x, labels).backward()
    theirs = {name: p.grad for name, p in published.named_parameters()}
    found = {"classifier.weight": model.classifier.weight, "vit.embeddings.cls_token": model.first}
    found["vit.embeddings.patch_embeddings.projection.weight"] = model.embed.weight
    found["vit.embeddings.position_embeddings"] = model.positions
    for name, leaf in found.items():
        grad = theirs[name]
        torch.testing.assert_close(gradient(leaf), grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item())


def _read(folder: Path) -> tuple[ViTConfig, dict[str, torch.Tensor]]:
    return checkpoint.load_model(folder, ViTConfig.from_hugging_face)


def test_export_loads_into_transformers(published: Any, home: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="loads what we save, a test extra")
    model = perturbed(ViT(TINY))
    folder = home / "ours"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY.to_hugging_face()))
    torch.save(model.to_hugging_face(), folder / "pytorch_model.bin")
    theirs = transformers.ViTForImageClassification.from_pretrained(folder).eval()
    x = torch.randn(4, 3, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits, model(x), rtol=0, atol=1e-4)
    again = ViT(TINY)
    again.load_hugging_face(model.to_hugging_face())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("name, parameters", [("vit-base", 86_567_656), ("vit-large", 304_326_632)])
def test_published_sizes(name: str, parameters: int) -> None:
    config = replace(vit.CONFIGS[name], labels=tuple(map(str, range(1000))))
    with torch.device("meta"):
        model = ViT(config)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model_type": "bert"}, "model_type: expected 'vit'"),
        ({"hidden_act": "relu"}, "hidden_act: expected 'gelu'"),
        ({"qkv_bias": False}, "qkv_bias: expected True"),
        ({"image_size": 13}, "expected image_size divisible by patch_size, but got 13 and 4; pad or crop"),
        ({"num_attention_heads": 3}, "expected hidden_size divisible by num_attention_heads, but got 32 and 3"),
    ],
)
def test_foreign_configs_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ViTConfig.from_hugging_face({**TINY.to_hugging_face(), **values})


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(UserError, match=r"expected images of \[3, 12, 12\], but got \[1, 12, 12\]"):
        ViT(TINY)(torch.zeros(2, 1, 12, 12))


# ---- The program


def test_logistic_regression_is_at_its_minimum() -> None:
    pixels, labels = drawn(200, 0)
    x, y = torch.from_numpy(pixels[:, None]), torch.from_numpy(labels.astype("int64"))
    w = logistic.fit(logistic.features(x), y, 2, penalty=0.01).requires_grad_()
    logistic.objective(w, logistic.features(x), y, 0.01).backward()
    assert w.grad is not None and w.grad.abs().max() < 1e-3
    said = logistic.predict(images.Images(x, y), 2, torch.from_numpy(drawn(100, 1)[0][:, None]))
    assert (said.argmax(1).numpy() == drawn(100, 1)[1]).mean() > 0.9


@pytest.fixture
def train(home: Path, command: Run) -> Run:
    """Runs `torchweld train vit --config tiny` on images of bars and squares."""
    options = ("--config", "tiny", "--device", "cpu", "--no-keep-memory", "--data", write_idx(home / "idx"))
    return lambda *words: command("train", "vit", *options, *words)


@pytest.mark.slow
def test_it_learns_beside_stock_and_classifies(train: Run, command: Run, home: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="loads the checkpoint with transformers, a test extra")
    code, out, error = train("--steps", 40, "--validate-every", 20, "--compare", "torch", "--out", "run", "--flip")
    assert code == 0, error
    assert "they agree" in out and "images/s" in out and "logistic regression" in out and "square" in out
    assert Path("run/confusion.png").stat().st_size > 1000
    assert transformers.ViTForImageClassification.from_pretrained("run/checkpoint-40").config.id2label[1] == "square"
    processor = transformers.AutoImageProcessor.from_pretrained("run/checkpoint-40")
    assert processor.size["height"] == 8 and list(processor.image_mean) == [0.5]
    folder = write_folders(home / "folders", 30)
    paths = sorted(folder.glob("*/*.png"))
    code, out, error = command("classify", "--checkpoint", "run", *paths, "--device", "cpu", "--json")
    assert code == 0, error
    said = [json.loads(line) for line in out.splitlines()]
    assert [line["file"] for line in said] == list(map(str, paths))
    assert sum(line["label"] == Path(line["file"]).parent.name for line in said) >= 27
    code, out, _ = command("classify", "--checkpoint", "run", paths[0], "--device", "cpu")
    assert code == 0 and out == f"{said[0]['label']}\t{said[0]['probability']}\t{paths[0]}\n"


@pytest.mark.slow
def test_resume_continues_bit_for_bit(train: Run, command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    check_resuming(train, partial(command, "train", "vit"), monkeypatch, FILES, ("--shift", 1, "--flip"))


def test_refusals(train: Run, command: Run, home: Path) -> None:
    one = write_folders(home / "folders")
    for path in (one / "square").iterdir():
        path.unlink()
    for words, message in (
        (("--data", one), "expected images of 2 or more classes, but got 1 (bar)"),
        (("--likelihood", "logistic"), "--likelihood: expected a program that has this option, but got vit"),
        (("--data", write_idx(home / "odd", size=10)), "expected image_size divisible by patch_size, but got 10 and 4"),
    ):
        code, _, error = train(*words)
        assert code == 2 and message in error and not Path("torchweld-vit").exists()


def test_classify_refuses(command: Run, home: Path) -> None:
    folder = home / "vit"
    folder.mkdir()
    model = ViT(replace(TINY, image_size=8, num_channels=1, labels=NAMES))
    (folder / "config.json").write_text(json.dumps(model.config.to_hugging_face()))
    save_file({name: t.contiguous() for name, t in model.to_hugging_face().items()}, folder / "model.safetensors")
    (home / "a.png").write_text("no image")
    for words, message in (
        ((), "expected the names of images, but got none"),
        (("a.png",), "a.png: expected an image, but got"),
        (("b.png",), "b.png: expected an image, but got: No such file"),
    ):
        code, out, error = command("classify", "--checkpoint", folder, "--device", "cpu", *words)
        assert code == 2 and out == "" and message in error
