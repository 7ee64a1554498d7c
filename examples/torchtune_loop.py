"""A fine-tuning recipe in the style of torchtune. The two lines marked `# torchweld` swap its optimizer and its loss.

As in torchtune the loss takes the hidden states and makes the logits itself, a chunk of tokens at a time.
"""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import torchweld


def chunked_loss(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of 8 chunks of tokens, each with its own logits, as in torchtune's LinearCrossEntropyLoss."""
    rows, targets = hidden.flatten(0, 1).chunk(8), labels.flatten().chunk(8)
    sums = [nn.functional.cross_entropy(r @ head.T, t, reduction="sum") for r, t in zip(rows, targets, strict=True)]
    return torch.stack(sums).sum() / (labels != -100).sum()


torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=97, **sizes))
loss_fn, AdamW = chunked_loss, torch.optim.AdamW
loss_fn = torchweld.ops.linear_cross_entropy  # torchweld
AdamW = torchweld.optim.AdamW  # torchweld
optimizer = AdamW(model.parameters(), lr=3e-3)

tokens = (torch.arange(16).unsqueeze(1) + torch.arange(33)) % 97
labels = tokens[:, 1:].masked_fill(torch.arange(32) < 8, -100)  # the prompt has no loss
losses = []
for _ in range(6):
    for micro, target in zip(
        tokens[:, :-1].split(8), labels.split(8), strict=True
    ):  # gradients accumulate over 2 parts
        hidden = model.model(micro).last_hidden_state
        loss = loss_fn(hidden, model.lm_head.weight, target)
        (loss / 2).backward()
        losses.append(loss.item())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
print(f"loss: {losses[0]:.3f} to {losses[-1]:.3f}")
