"""The VAE: its likelihoods are probabilities, its bound is one, it learns, resumes to the bit and makes images up."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from commands import Run, check_resuming
from pictures import NAMES, drawn, write_folders, write_idx
from torchweld.errors import UserError
from torchweld.models import VAE, VAEConfig, stock, vae
from torchweld.training import coders, extras, images

TINY = replace(vae.CONFIGS["tiny"], height=8, width=8, labels=NAMES)
FILES = ("config.json", "model.safetensors", "optimizer.safetensors", "training.json")


@pytest.mark.parametrize("name", vae.LIKELIHOODS)
def test_a_likelihood_is_a_probability_of_levels(name: str) -> None:
    """Over all levels of a number it sums to one, also where the decoder says extremes."""
    kind = vae.likelihood(name)
    means = torch.tensor([-3.0, -0.2, 0.0, 0.25, 0.5013, 1.0, 1.4, 40.0], dtype=torch.float64)
    if name == "gaussian":  # there is no rest beyond the outermost levels
        means = means.clamp(0.4, 0.6)
    scales = torch.tensor([-30.0, -7.0, -5.0, -3.0, 0.0, 5.0], dtype=torch.float64)
    mean, scale = (x.flatten() for x in torch.meshgrid(means, scales, indexing="ij"))
    x = torch.arange(kind.levels, dtype=torch.float64)[:, None] / (kind.levels - 1)
    says = torch.stack([mean, scale])[: kind.outputs].expand(kind.levels, -1, -1)
    learned = torch.tensor([-4.0], dtype=torch.float64)
    nll = kind.nll(x.expand(-1, len(mean)), says, learned)
    assert nll.isfinite().all()
    torch.testing.assert_close(nll.neg().exp().sum(0), torch.ones_like(mean), rtol=0, atol=1e-6)
    assert ((kind.mean(says) >= 0) & (kind.mean(says) <= 1)).all()


def test_the_logistic_likelihood_keeps_its_digits_in_float32() -> None:
    x = torch.rand(200).mul(255).round() / 255
    says = torch.stack([torch.rand(200), torch.empty(200).uniform_(-8, 0)], dim=0)[None]
    exact = vae.LIKELIHOODS["logistic"].nll(x.double()[None], says.double(), None)
    leaf = says.clone().requires_grad_()
    ours = vae.LIKELIHOODS["logistic"].nll(x[None], leaf, None)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)
    ours.sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()


def test_the_gaussian_likelihood_learns_from_the_squared_error() -> None:
    x, says = torch.rand(4, 10), torch.rand(4, 1, 10, requires_grad=True)
    learned = torch.tensor([-2.0])
    vae.LIKELIHOODS["gaussian"].nll(x, says, learned).sum().backward()
    deviation = torch.nn.functional.softplus(learned) + 1 / 255
    torch.testing.assert_close(says.grad, (says.detach() - x[:, None]) / deviation.square())


def test_divergence_is_that_of_torch() -> None:
    mean, scale, of, width = torch.randn(4, 5, 3).unbind()
    expected = kl_divergence(Normal(mean, scale.exp()), Normal(of, width.exp())).sum(1)
    torch.testing.assert_close(vae.divergence(mean, scale, of, width), expected)


def given(config: VAEConfig, count: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    pixels = torch.rand(count, config.channels, config.height, config.width).mul(255).round() / 255
    return pixels, torch.randint(config.classes, (count,)), torch.randn(count, config.latents)


@pytest.mark.parametrize("name", vae.LIKELIHOODS)
def test_losses_are_bits_of_image_class_and_latents(ops: ModuleType, name: str) -> None:
    config = replace(TINY, channels=3, height=12, likelihood=name)
    model = VAE(config, ops)
    pixels, labels, noise = given(config)
    pixels = pixels.round() if name == "bernoulli" else pixels
    losses = model.losses(pixels, labels, noise)
    mean, scale = model.encode(pixels)
    posterior = Normal(mean, scale.exp())
    prior = Normal(model.prior_mean[labels], model.prior_scale[labels].exp())
    kl = kl_divergence(posterior, prior).sum(1).mean() + math.log(2)
    torch.testing.assert_close(losses["kl"] * 3 * 12 * 8 * math.log(2), kl)
    says = model.decode(posterior.mean + posterior.stddev * noise)
    assert says.shape == (6, model.likelihood.outputs, 3, 12, 8)
    nll = model.likelihood.nll(pixels, says, model.learned).sum() / 6
    torch.testing.assert_close(losses["nll"] * 3 * 12 * 8 * math.log(2), nll)
    sum(losses.values(), torch.tensor(0.0)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_ours_and_stock_agree_and_a_checkpoint_loads(home: Path) -> None:
    model, other = VAE(TINY), VAE(TINY, stock)
    other.load_hugging_face(model.to_hugging_face())
    args = given(TINY)
    for name, loss in model.losses(*args).items():
        torch.testing.assert_close(loss, other.losses(*args)[name], rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match=r"VAE weights: prior_mean: expected shape"):
        VAE(replace(TINY, latents=4)).load_hugging_face(model.to_hugging_face())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"height": 30}, "expected height and width divisible by 4, but got 30 x 8; pad or crop"),
        ({"latents": 0}, "latents: expected a positive whole number, but got 0"),
        ({"likelihood": "mse"}, "likelihood: expected one of logistic, gaussian, bernoulli, but got 'mse'"),
    ],
)
def test_unfit_configs_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        VAEConfig.from_json({**TINY.to_json(), **change})
    with pytest.raises(UserError, match="model_type: expected 'torchweld-vae'"):
        VAEConfig.from_json({"model_type": "gpt2"})


# ---- What it is compared with


def test_costs_without_a_network(home: Path) -> None:
    pictures = images.read(write_idx(home / "idx"))
    costs = coders.bits(pictures, 256)
    assert (
        next(iter(costs)) == "independent pixels" and len(costs) == 5 and all(0 < cost < 40 for cost in costs.values())
    )
    # By hand: each pixel's levels are counted, plus one, over the images for training.
    seen = np.zeros((64, 256)) + 1
    for image in pictures.training.pixels.flatten(1).numpy():
        seen[np.arange(64), image] += 1
    cost = -np.log2(seen / seen.sum(1, keepdims=True))
    test = pictures.test.pixels.flatten(1).numpy()
    assert costs["independent pixels"] == pytest.approx(float(np.mean([cost[np.arange(64), x] for x in test])))
    plain = coders.bits(images.black_and_white(pictures), 2)
    assert plain["independent pixels"] < 1 and all(plain[name] < costs[name] for name in costs)


def test_principal_components_are_the_best_projection() -> None:
    pixels, labels = drawn(200, 0)
    found = images.Images(torch.from_numpy(pixels[:, None]), torch.from_numpy(labels.astype(np.int64)))
    x = (found.pixels.float() / 255).double().flatten(1)
    values = torch.linalg.svdvals(x - x.mean(0))
    left = coders.principal_components(found, 5)(found.pixels.float() / 255).flatten(1)
    assert float((left - x).square().sum()) == pytest.approx(float(values[5:].square().sum()), rel=1e-3)


# ---- The program


@pytest.fixture
def train(home: Path, command: Run) -> Run:
    """Runs `torchweld train vae --config tiny` on images of bars and squares."""
    folder = write_idx(home / "idx")
    options = ("--config", "tiny", "--device", "cpu", "--no-keep-memory", "--data", folder)
    return lambda *words: command("train", "vae", *options, *words)


@pytest.mark.slow
def test_it_learns_beside_stock_and_draws(train: Run, command: Run) -> None:
    code, out, error = train(
        "--steps", 40, "--validate-every", 20, "--compare", "torch", "--out", "run", "--learning-rate", 0.01
    )
    assert code == 0, error
    assert "they agree" in out and "images/s" in out and "tokens" not in out
    training = json.loads(Path("run/checkpoint-40/training.json").read_text())
    assert training["validation"][-1][1] < training["losses"][0] - 0.5
    assert training["settings"]["options"] == {"likelihood": "logistic", "shift": "0", "flip": "no"}
    for name in ("VAE", "gzip", "PNG", "WebP", "PCA, 8 components", "independent pixels"):
        assert name in out
    model = VAE.load("run/checkpoint-40")
    assert model.config.labels == NAMES and not model.training
    for words, rows in (
        (("--grid",), 2),
        (("--class", "square"), 10),
        (("--interpolate",), 2),
        (("--reconstruct", "--data", "idx"), 10),
    ):
        code, out, error = command("sample", "--checkpoint", "run", *words, "--out", "a.png", "--device", "cpu")
        assert code == 0 and out == "a.png\n", error
        with Image.open("a.png") as picture:
            assert picture.mode == "L" and picture.size == (10 * 10 + 2, rows * 10 + 2)
    square = np.asarray(Image.open("a.png"))[2:10, 2:10]
    test = images.read(Path("idx")).test.pixels[0, 0].numpy()
    assert (square == test).all()  # the first row is what was given


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_other_likelihoods_learn(train: Run, likelihood: str) -> None:
    code, _, error = train("--steps", 25, "--likelihood", likelihood, "--flip", "--shift", 1, "--out", "run")
    assert code == 0, error
    losses = json.loads(Path("run/checkpoint-25/training.json").read_text())["losses"]
    assert losses[-1] < losses[0] - 0.2
    assert VAE.load("run/checkpoint-25").config.likelihood == likelihood


def test_colours_and_one_class(home: Path, command: Run) -> None:
    folder = write_folders(home / "folders", mode="RGB")
    for path in folder.glob("*/*.png"):
        path.rename(folder / f"{path.parent.name}-{path.name}")
    options = ("--config", "tiny", "--device", "cpu", "--no-keep-memory", "--steps", 2, "--out", "run")
    code, out, error = command("train", "vae", *options, "--data", folder)
    assert code == 0 and "in colour, 1 classes" in out, error
    assert command("sample", "--checkpoint", "run", "--out", "a.png", "--device", "cpu")[0] == 0
    with Image.open("a.png") as picture:
        assert picture.mode == "RGB" and picture.size == (102, 102)


@pytest.mark.slow
def test_resume_continues_bit_for_bit(train: Run, command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    check_resuming(train, partial(command, "train", "vae"), monkeypatch, FILES, ("--shift", 1, "--flip"))
    code, _, error = command("train", "vae", "--device", "cpu", "--resume", "broken", "--shift", 2)
    assert code == 2 and "--shift: expected '1', with which the run was started, but got '2'" in error


@pytest.mark.parametrize(
    "words, message",
    [
        (("--likelihood", "mse"), "likelihood: expected one of logistic, gaussian, bernoulli, but got 'mse'"),
        (("--shift", "-1"), "--shift: expected a number of pixels, but got '-1'"),
        (("--config", "huge"), "--config: expected one of tiny, small, medium, large, but got 'huge'"),
    ],
)
def test_bad_options_are_refused(train: Run, words: tuple[str, ...], message: str) -> None:
    code, _, error = train(*words)
    assert code == 2 and message in error and not Path("torchweld-vae").exists()


def test_options_of_other_programs_are_refused(command: Run, home: Path) -> None:
    code, _, error = command("train", "gpt2", "--likelihood", "logistic")
    assert code == 2 and "--likelihood: expected a program that has this option, but got gpt2" in error
    code, _, error = command("train", "vae", "--data", write_idx(home / "odd", size=10), "--config", "tiny")
    assert code == 2 and "divisible by 4, but got 10 x 10" in error and not Path("torchweld-vae").exists()


@pytest.fixture
def checkpoint(home: Path) -> Path:
    """A VAE of random weights."""
    folder = home / "vae"
    folder.mkdir()
    model = VAE(TINY)
    (folder / "config.json").write_text(json.dumps(model.config.to_json()))
    save_file({name: t.contiguous() for name, t in model.to_hugging_face().items()}, folder / "model.safetensors")
    return folder


def test_sample_refuses(checkpoint: Path, command: Run, home: Path) -> None:
    write_idx(home / "other", size=12)
    for words, message in (
        (("--class", "circle"), "--class: expected one of bar, square, but got 'circle'"),
        (
            ("--reconstruct", "--data", home / "other"),
            "expected images of 8 x 8 with 1 channel(s), as the model's, but",
        ),
        (
            ("--out", home / "nowhere/a.png"),
            "nowhere/a.png: expected a file that can be written, but got: No such file",
        ),
        (("--grid", "--interpolate"), "not allowed with argument"),
    ):
        code, out, error = command("sample", "--checkpoint", checkpoint, "--device", "cpu", *words)
        assert code == 2 and out == "" and message in error
    (checkpoint / "model.safetensors").unlink()
    code, _, error = command("sample", "--checkpoint", checkpoint, "--device", "cpu")
    assert code == 2 and "model.safetensors: expected one that `torchweld train` wrote" in error


def test_sample_says_that_pillow_is_missing(checkpoint: Path, command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    code, _, error = command("sample", "--checkpoint", checkpoint, "--device", "cpu")
    assert code == 2 and "sample needs Pillow: pip install torchweld[images]" in error


def test_fashion_mnist_is_known() -> None:
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.is_dir():
        pytest.skip("reads Debian's package dataset-fashion-mnist, which is not installed")
    found = images.load(None)
    assert found.labels == images.FASHION and len(found.test) == 10000
    assert len(found.training) + len(found.validation) == 60000
