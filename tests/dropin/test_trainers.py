"""A few steps inside Hugging Face Trainer, Accelerate and Lightning: the same losses as with torch's own optimizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import torchweld.nn
from torchweld import ops, optim

STEPS, LIMIT = 4, 0.3
ADAM = {
    "lr": 0.05,
    "eps": 1e-3,
}  # a usual eps would blow up the rounding of a gradient that is really zero: the keys' bias
X, Y = torch.randn(STEPS * 4, 6, 12), torch.randint(3, (STEPS * 4,))
Optimizer = Callable[..., torch.optim.Optimizer]


class Model(nn.Module):
    """A classifier on our layers or, with `of=torch.nn`, on torch's; speaks as a Hugging Face model does."""

    def __init__(self, ours: bool) -> None:
        super().__init__()
        of = torchweld.nn if ours else torch.nn
        self.norm, self.attention = of.LayerNorm(12), of.MultiheadAttention(12, 2, batch_first=True)
        self.head = nn.Linear(12, 3)
        self.cross_entropy = ops.cross_entropy if ours else nn.functional.cross_entropy
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in self.parameters():
                p.add_(torch.randn(p.shape, generator=generator) * 0.2 - p)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        normed = self.norm(x)
        mixed, _ = self.attention(normed, normed, normed, need_weights=False)
        logits = self.head(mixed.mean(1))
        return {"loss": self.cross_entropy(logits, labels), "logits": logits}


def expected() -> tuple[Model, list[float]]:
    """torch alone: AdamW with a falling rate, each step's gradients clipped. The model and the loss of each step."""
    model, losses = Model(ours=False), []
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    schedule = LambdaLR(optimizer, falling)
    for x, y in zip(X.split(4), Y.split(4), strict=True):
        optimizer.zero_grad()
        loss = model(x, y)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return model, losses


def falling(step: int) -> float:
    return 1.0 - step / STEPS


def ours() -> tuple[Model, optim.AdamW, LambdaLR]:
    model = Model(ours=True)
    optimizer = optim.AdamW(model.parameters(), **ADAM, max_grad_norm=LIMIT)
    return model, optimizer, LambdaLR(optimizer, falling)


def same(model: nn.Module, losses: list[float]) -> None:
    reference, wanted = expected()
    assert losses == pytest.approx(wanted, rel=1e-4)
    for (name, p), q in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert name == q[0]
        torch.testing.assert_close(p, q[1], rtol=1e-4, atol=1e-5)


class Examples(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": X[index], "labels": Y[index]}


def test_hugging_face_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers, of the test extra")
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate, of the test extra")
    model, optimizer, schedule = ours()
    losses: list[float] = []

    class Trainer(transformers.Trainer):
        def _get_train_sampler(self, *args: object) -> torch.utils.data.SequentialSampler:
            return torch.utils.data.SequentialSampler(Examples())

        def training_step(self, *args: object, **options: object) -> Tensor:
            losses.append((loss := super().training_step(*args, **options)).item())
            return loss

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, max_steps=STEPS, per_device_train_batch_size=4, max_grad_norm=0.0,
        report_to=[], save_strategy="steps", save_steps=STEPS, logging_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=False, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=Examples(), optimizers=(optimizer, schedule))
    trainer.train()
    same(model, losses)
    stored = torch.load(tmp_path / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)
    assert {float(s["step"]) for s in stored["state"].values()} == {float(STEPS)}


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate, of the test extra")
    accelerator = accelerate.Accelerator(cpu=True)
    loader = torch.utils.data.DataLoader(Examples(), batch_size=4)
    model, optimizer, schedule, loader = accelerator.prepare(*ours(), loader)
    losses = []
    for batch in loader:
        optimizer.zero_grad()
        loss = model(**batch)["loss"]
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    same(accelerator.unwrap_model(model), losses)


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="needs lightning, of the test extra")
    losses: list[float] = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model(ours=True)

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            losses.append((loss := self.model(**batch)["loss"]).item())
            return loss

        def configure_optimizers(self) -> object:
            optimizer = optim.AdamW(self.parameters(), **ADAM, max_grad_norm=LIMIT)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": LambdaLR(optimizer, falling), "interval": "step"},
            }

    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(Examples(), batch_size=4))
    same(module.model, losses)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    assert {float(s["step"]) for s in state.values()} == {float(STEPS)}
