"""FSDP2: parameters, gradients and the optimizer's state are shards; the step clips by the norm of all of them.

Run it by `torchrun --nproc-per-node 2 examples/fsdp2.py`, on CPUs (gloo) or on GPUs (nccl).
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import torchweld  # torchweld

device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl" if device == "cuda" else "gloo")
torch.manual_seed(0)
layers = [nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True) for _ in range(2)]
model = nn.Sequential(*layers, nn.Linear(64, 10)).to(device)
torchweld.patch(model)  # torchweld
for layer in model[:2]:
    fully_shard(layer)
fully_shard(model)
optimizer = torchweld.optim.AdamW(model.parameters(), lr=3e-3, max_grad_norm=1.0)  # torchweld

torch.manual_seed(dist.get_rank())  # each process has its own part of the batch
x, y = torch.randn(16, 12, 64, device=device), torch.randint(10, (16,), device=device)
losses = []
for _ in range(12):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x).mean(1), y)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
if dist.get_rank() == 0:
    print(f"loss: {losses[0]:.3f} to {losses[-1]:.3f}")
dist.barrier()
dist.destroy_process_group()
