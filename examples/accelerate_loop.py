"""A patched model and torchweld's AdamW in a loop of Accelerate."""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

import torchweld  # torchweld

torch.manual_seed(0)
accelerator = Accelerator(cpu=True)
config = GPT2Config(vocab_size=97, n_positions=32, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
model = GPT2LMHeadModel(config)
report = torchweld.patch(model)  # torchweld
optimizer = torchweld.optim.AdamW(model.parameters(), lr=3e-3, max_grad_norm=1.0)  # torchweld

tokens = (torch.arange(64).unsqueeze(1) + torch.arange(32)) % 97  # each text counts on from another number
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(tokens, batch_size=16, shuffle=True))
losses = []
for _ in range(3):
    for batch in loader:
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())
print(report, f"loss: {losses[0]:.3f} to {losses[-1]:.3f}", sep="\n")
