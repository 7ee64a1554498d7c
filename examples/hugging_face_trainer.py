"""A patched model and torchweld's AdamW in Hugging Face's Trainer."""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import torchweld  # torchweld

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=97, **sizes))
report = torchweld.patch(model)  # torchweld
optimizer = torchweld.optim.AdamW(model.parameters(), lr=3e-3, max_grad_norm=1.0)  # torchweld

tokens = (torch.arange(64).unsqueeze(1) + torch.arange(32)) % 97  # each text counts on from another number
texts = [{"input_ids": text, "labels": text} for text in tokens]
arguments = TrainingArguments(
    output_dir=tempfile.mkdtemp(), use_cpu=True, max_steps=12, per_device_train_batch_size=16, max_grad_norm=0.0,
    lr_scheduler_type="constant", logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True,
    dataloader_pin_memory=False,
)  # fmt: skip
trainer = Trainer(model=model, args=arguments, train_dataset=texts, optimizers=(optimizer, None))
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(report, f"loss: {losses[0]:.3f} to {losses[-1]:.3f}", sep="\n")
