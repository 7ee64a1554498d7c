"""A plain loop in float16 with GradScaler: unscaling, clipping, skipping and the step are one pass over memory."""

import torch
from torch import nn

import torchweld  # torchweld

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(64, 10)).to(device)
torchweld.patch(model)  # torchweld
# fused=True leaves unscaling and skipping to the step, as in torch; max_grad_norm clips there too.
optimizer = torchweld.optim.AdamW(model.parameters(), lr=3e-3, fused=True, max_grad_norm=1.0)  # torchweld
scaler = torch.amp.GradScaler(device)

x, y = torch.randn(32, 16, 64, device=device), torch.randint(10, (32,), device=device)
losses = []
for _ in range(12):
    optimizer.zero_grad()
    with torch.autocast(device, dtype=torch.float16):
        loss = nn.functional.cross_entropy(model(x).mean(1), y)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    losses.append(loss.item())
print(f"loss: {losses[0]:.3f} to {losses[-1]:.3f}, norm of the last gradients: {optimizer.grad_norm:.3f}")
