"""A GPT and a loop in the style of nanoGPT. The two lines marked `# torchweld` swap its layers and its optimizer."""

import torch
from torch import nn
from torch.nn import functional as F

import torchweld


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            t.view(batch, length, self.heads, -1).transpose(1, 2) for t in self.c_attn(self.ln_1(x)).split(width, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.ln_2(x))


torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(97, 64), Block(64, 4), Block(64, 4), nn.LayerNorm(64), nn.Linear(64, 97))
AdamW = torch.optim.AdamW
torchweld.patch(model)  # torchweld
AdamW = torchweld.optim.AdamW  # torchweld
optimizer = AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), fused=True)

data = torch.arange(2000) % 97
losses = []
for _ in range(12):
    starts = torch.randint(len(data) - 33, (16, 1))
    batch = data[starts + torch.arange(33)]
    loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    losses.append(loss.item())
print(f"loss: {losses[0]:.3f} to {losses[-1]:.3f}")
