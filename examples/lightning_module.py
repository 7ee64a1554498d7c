"""A patched encoder and torchweld's AdamW in a LightningModule."""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torchweld  # torchweld


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        self.head = nn.Linear(64, 10)
        self.losses = []
        torchweld.patch(self)  # torchweld

    def training_step(self, batch, index):
        loss = nn.functional.cross_entropy(self.head(self.encoder(batch[0]).mean(1)), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torchweld.optim.AdamW(self.parameters(), lr=3e-3, max_grad_norm=1.0)  # torchweld


torch.manual_seed(0)
labels = torch.randint(10, (128,))
examples = TensorDataset(torch.randn(10, 64)[labels].unsqueeze(1) + torch.randn(128, 16, 64), labels)
module = Classifier()
trainer = lightning.Trainer(
    accelerator="cpu", devices=1, max_epochs=2, logger=False, enable_progress_bar=False,
    enable_model_summary=False, enable_checkpointing=False,
)  # fmt: skip
trainer.fit(module, DataLoader(examples, batch_size=16))
losses = module.losses
print(f"loss: {losses[0]:.3f} to {losses[-1]:.3f}")
